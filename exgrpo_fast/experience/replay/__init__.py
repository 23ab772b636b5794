"""The replay buffer (ExGRPO and related methods)."""
