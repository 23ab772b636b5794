"""Which request of a generation lies at which server."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

S = TypeVar("S", bound=Hashable)


class Post(NamedTuple, Generic[S]):
    """Requests that go to a server together."""

    number: int
    server: S
    places: list[int]


class Dispatch(Generic[S]):
    """Requests by their places: waiting, in flight in a post, or finished.

    A server has at most `limit` in flight, so one that is slower gets fewer. Each request has one
    outcome: it is in one post at a time, and a completion counts once.
    """

    def __init__(self, num_requests: int, *, limit: int) -> None:
        self.limit = limit
        self.waiting = deque(range(num_requests))
        self.in_flight: dict[int, tuple[S, set[int]]] = {}  # number of a post -> its open places
        self.num_posts = 0
        self.num_returned = 0  # requests that a post has not finished

    def load(self, server: S) -> int:
        return sum(len(places) for at, places in self.in_flight.values() if at == server)

    def assign(self, servers: Sequence[S]) -> list[Post[S]]:
        """What to send now: each waiting request to the server with the fewest in flight.

        Neighbours in the list share a question: while all keep up each server meets its prompt, and
        caches it. A server is sent nothing until it has room for an eighth of the limit, so that
        there are few posts.
        """
        least = min(max(1, self.limit // 8), len(self.waiting))
        load = {server: self.load(server) for server in servers}
        open_servers = [server for server in servers if self.limit - load[server] >= least]
        shares: dict[S, list[int]] = {server: [] for server in open_servers}
        while self.waiting and open_servers:
            server = min(open_servers, key=load.__getitem__)
            shares[server].append(self.waiting.popleft())
            load[server] += 1
            if load[server] == self.limit:
                open_servers.remove(server)
        return [self._post(server, places) for server, places in shares.items() if places]

    def _post(self, server: S, places: list[int]) -> Post[S]:
        self.num_posts += 1
        self.in_flight[self.num_posts] = (server, set(places))
        return Post(self.num_posts, server, places)

    def finish(self, post: Post[S], place: int) -> bool:
        """Whether this request was open in the post, and is finished now."""
        places = self.in_flight[post.number][1]
        is_open = place in places
        places.discard(place)
        return is_open

    def end(self, post: Post[S]) -> int:
        """How many requests the post has not finished; they wait again, before all others."""
        _, places = self.in_flight.pop(post.number)
        self.waiting.extendleft(sorted(places, reverse=True))
        self.num_returned += len(places)
        return len(places)
