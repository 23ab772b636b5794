"""What this package never does, held by reading its sources and by watching a run."""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REWARDS, exit_code

from exgrpo_fast.cli.train_run import environment
from exgrpo_fast.run.directory import RunFolder

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("exgrpo_fast/**/*.py"), *ROOT.glob("kernels/**/*.py")])

# Modules that turn bytes into objects of any class, or listen to a network.
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
LISTENERS = {"http.server", "socketserver", "xmlrpc.server", "multiprocessing.managers"}
LISTENING_CALLS = {"bind", "listen", "start_server", "start_unix_server", "create_server"}
MAY_LISTEN = {  # on a Unix socket or the loopback interface
    "exgrpo_fast/rollout/server/server.py",
    "exgrpo_fast/rollout/server/weight_transfer.py",
    "exgrpo_fast/run/live_page.py",
}
CODE_FROM_TEXT = {"eval", "exec", "compile", "__import__"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
UNPICKLERS = {"torch.load", "np.load", "numpy.load", "torch.jit.load", "pd.read_pickle"}
LOOSE_YAML = {"yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "yaml.unsafe_load_all"}


def name_of(node: ast.expr) -> str:
    """'torch.load' for the expression torch.load; of anything else its last word."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = name_of(node.value)
        return f"{inner}.{node.attr}" if inner else node.attr
    return ""


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((word.value for word in call.keywords if word.arg == name), None)


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        return {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


def faults(tree: ast.AST, file: str) -> Iterator[str]:
    """Every line of a file that breaks a rule."""
    for node in ast.walk(tree):
        names = imported(node)
        if PICKLES & {name.split(".")[0] for name in names}:
            yield f"{file}:{node.lineno}: unpickles"  # pyright: ignore[reportAttributeAccessIssue]
        if LISTENERS & names and file not in MAY_LISTEN:
            yield f"{file}:{node.lineno}: listens"  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(node, ast.Call):
            yield from (f"{file}:{node.lineno}: {what}" for what in call_faults(node, file))


def call_faults(call: ast.Call, file: str) -> Iterator[str]:
    name = name_of(call.func)
    last = name.rpartition(".")[2]
    if name in UNPICKLERS or keyword(call, "allow_pickle") is not None:
        yield "unpickles"
    if name in CODE_FROM_TEXT:
        yield "runs text as code"
    if name in SHELLS or not is_constant(keyword(call, "shell") or ast.Constant(False), False):
        yield "runs a shell"
    if name in LOOSE_YAML or (name == "yaml.load" and not_strict(call)):
        yield "reads YAML with more than safe types"
    trust = keyword(call, "trust_remote_code")
    if trust is not None and not is_constant(trust, False):
        yield "trusts remote code"
    if last == "from_pretrained" and trust is None:
        yield "does not say trust_remote_code=False"
    # A GGUF file holds numbers and texts alone, and transformers takes no flag with it.
    is_gguf = keyword(call, "gguf_file") is not None
    if last == "from_pretrained" and name.startswith("AutoModel") and not is_gguf:
        if not is_constant(keyword(call, "use_safetensors"), True):
            yield "loads weights that are no safetensors"
    if last in LISTENING_CALLS and "." in name and file not in MAY_LISTEN:
        yield "listens"


def not_strict(call: ast.Call) -> bool:
    loader = keyword(call, "Loader")
    return loader is None or name_of(loader) not in {"StrictLoader", "yaml.SafeLoader"}


def test_no_source_breaks_a_rule() -> None:
    assert len(SOURCES) > 60
    found = [
        fault
        for path in SOURCES
        for fault in faults(ast.parse(path.read_text()), str(path.relative_to(ROOT)))
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import torch; torch.load('x', weights_only=True)",
        "np.load('x.npy')",
        "read('x', allow_pickle=True)",
        "eval('1')",
        "exec(text)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "subprocess.Popen('ls', shell=flag)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "AutoTokenizer.from_pretrained(name)",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=flag)",
        "AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)",
        "load(name, trust_remote_code=True)",
        "import http.server",
        "from socketserver import TCPServer",
        "server.bind(('', 80))",
        "await asyncio.start_server(f)",
    ],
)
def test_each_rule_has_teeth(line: str) -> None:
    tree = ast.parse(f"async def f():\n    {line}")
    assert list(faults(tree, "exgrpo_fast/anything.py")) != []


def test_three_files_may_listen() -> None:
    tree = ast.parse("server.bind(path)")
    assert list(faults(tree, "exgrpo_fast/rollout/server/server.py")) == []


# --- a run, watched ------------------------------------------------------------------------------

TINY = f"""
    train exgrpo --out run --data.train rows.jsonl --data.check_answers false --reward.workers 1
    --reward.functions [{REWARDS}:even_length] --rollout.prompts_per_step 4 --rollout.group_size 4
    --rollout.max_completion_tokens 8 --replay.start_success_rate null --train.lr 1e-3
    --checkpoint.every 1 --no-supervise
""".split()

watched: list[tuple[str, tuple]] | None = None  # a hook stays for good: this switches it


def watch(event: str, arguments: tuple) -> None:
    interesting = ("open", "os.rename", "os.mkdir", "os.remove", "os.symlink", "shutil.rmtree")
    if watched is not None and (event in interesting or event.startswith(("socket.", "pickle."))):
        watched.append((event, arguments))


sys.addaudithook(watch)


@pytest.fixture
def events(tmp_path: Path, model_folder: Path, monkeypatch) -> list[tuple[str, tuple]]:
    """What two steps, a resume and a third step did."""
    global watched
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "s3cret" * 6)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "s3cret")
    rows = [{"prompt": f"{i} + 1?", "answer": "3"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*TINY, "--model.name", str(model_folder)]
    watched = found = []
    try:
        for more in (["--max-steps", "2"], ["--max-steps", "3", "--resume", "auto"]):
            assert exit_code(*words, *more) == 0
    finally:
        watched = None
    return found


def written(event: str, arguments: tuple) -> list[str]:
    """The paths that an event changes."""
    if event == "open":
        path, _, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        return [os.fspath(path)] if writes and isinstance(path, str | os.PathLike) else []
    if event == "os.rename":
        return [os.fspath(path) for path in arguments[:2]]
    if event == "os.remove" and arguments[1] != -1:  # inside a folder that rmtree has told of
        return []
    if event in ("os.mkdir", "os.remove", "os.symlink", "shutil.rmtree"):
        return [os.fspath(arguments[0])]
    return []


def test_a_run_writes_into_its_folder_listens_to_nobody_and_unpickles_nothing(
    events, tmp_path: Path
) -> None:
    assert [event for event, _ in events if event.startswith("pickle.")] == []
    talked = {event for event, _ in events if event.startswith("socket.")}
    assert not talked & {"socket.bind", "socket.connect", "socket.getaddrinfo"}
    paths = {os.path.realpath(path) for event in events for path in written(*event)}
    inside = {path for path in paths if path.startswith(f"{tmp_path}/run")}
    elsewhere = {path for path in paths - inside if not path.startswith(("/dev/", "/proc/"))}
    caches = ("__pycache__", "/.cache/", "/tmp/torchinductor")  # of Python and the libraries
    assert [path for path in elsewhere if not any(cache in path for cache in caches)] == []
    assert len(inside) > 20
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or b"s3cret" not in file.read_bytes(), file


def test_no_secret_reaches_env_json(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "s3cret" * 6)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-" + "s3cret" * 6)
    assert "s3cret" not in json.dumps(environment("cpu"))


def test_deleting_follows_no_link(tmp_path: Path) -> None:
    from exgrpo_fast.run.checkpoint.format import CannotSave, Checkpoints

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    folder = RunFolder(tmp_path / "run", resume=False)
    folder.checkpoints.mkdir()
    (folder.checkpoints / ".tmp-step_1").symlink_to(precious)
    with pytest.raises(CannotSave, match="symbolic link"):
        Checkpoints(folder.checkpoints).save(1, Path.mkdir, {"num_steps": 1})
    assert (precious / "file").read_text() == "kept"
    folder.close()


def test_code_in_a_model_folder_is_not_run(tmp_path: Path, model_folder: Path) -> None:
    import shutil

    from exgrpo_fast.core.errors import UserError
    from exgrpo_fast.model.folder_reading import load_tokenizer
    from exgrpo_fast.model.policy import load_model

    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    canary = tmp_path / "canary"
    (model / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((model / "config.json").read_text())
    classes = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    config |= {"auto_map": classes, "model_type": "evil"}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="model.name"):
        load_model(str(model))
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    try:
        load_tokenizer(str(model))
    except UserError:
        pass
    assert not canary.exists()


def test_weights_that_are_a_pickle_are_refused(tmp_path: Path, model_folder: Path) -> None:
    import shutil

    from exgrpo_fast.core.errors import UserError
    from exgrpo_fast.model.policy import load_model

    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    canary = tmp_path / "canary"
    (model / "model.safetensors").unlink()
    evil = f"cbuiltins\nexec\n(Vopen({str(canary)!r}, 'w')\ntR."
    (model / "pytorch_model.bin").write_bytes(evil.encode())
    with pytest.raises(UserError, match="model.name"):
        load_model(str(model))
    assert not canary.exists()
