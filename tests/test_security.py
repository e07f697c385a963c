"""Nothing is unpickled but model files that the user names, nothing is run through a shell, and nothing is written elsewhere."""

from __future__ import annotations

import ast
import getpass
import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bnn_driver.potential.mace import EMBEDDED

sys.path.insert(0, str(Path(__file__).parent / "loops"))
from small_run import command, program, write_run

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "bnn_driver").rglob("*.py"), *(ROOT / "oracles").rglob("*.py")])
UNPICKLE = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "jsonpickle"}
#: what a name of these modules may be called for
CALLS = {
    "torch.load": "unpickles",
    "torch.jit.load": "runs what is in the file",
    "numpy.load": "unpickles with allow_pickle",
    "np.load": "unpickles with allow_pickle",
    "np.fromregex": "evaluates",
    "os.system": "is a shell",
    "os.popen": "is a shell",
    "subprocess.getoutput": "is a shell",
    "subprocess.getstatusoutput": "is a shell",
}
BUILT_IN = {"eval", "exec", "compile", "__import__"}
#: a model file is a pickle; it is one that the user named, and its checksum is kept with the physics of a run
ALLOWED = {
    ("bnn_driver/potential/mace.py", "torch.load"),
    ("bnn_driver/potential/mace.py", "pickle.UnpicklingError"),
    ("oracles/model.py", "torch.load"),
    ("oracles/model.py", "pickle.UnpicklingError"),
}


def dotted(node: ast.AST) -> str:
    """a.b.c of an expression; empty where it is none."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value) or '?'}.{node.attr}"
    return ""


def dangers(tree: ast.AST) -> Iterator[str]:
    """Names of all that unpickles, evaluates or starts a shell."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLE:
            yield f"from {node.module}"
        elif isinstance(node, ast.Attribute) and dotted(node).split(".")[0] in UNPICKLE:
            yield dotted(node)
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in CALLS or name in BUILT_IN:
                yield name
            if name.startswith(("multiprocessing.Pool", "ProcessPoolExecutor", "concurrent.futures.ProcessPool")):
                yield name
            for word in node.keywords:
                if word.arg in ("shell", "allow_pickle") and not (
                    isinstance(word.value, ast.Constant) and word.value.value is False
                ):
                    yield f"{name}({word.arg})"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_unpickled_evaluated_or_given_to_a_shell(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    found = {(name, danger) for danger in dangers(ast.parse(path.read_text(encoding="utf-8")))}
    assert found <= ALLOWED


@pytest.mark.parametrize(
    "code",
    ["import pickle; pickle.loads(b'')", "from yaml import load", "torch.load(f)", "np.load(f, allow_pickle=True)", "eval(x)",
     "subprocess.run(x, shell=True)", "os.system(x)", "np.load(f)"],
)  # fmt: skip
def test_the_test_above_sees_what_it_looks_for(code: str) -> None:
    assert list(dangers(ast.parse(code)))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_source_listens_to_the_world(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant):
            assert node.value not in ("0.0.0.0", "::", "INADDR_ANY"), f"{path}:{node.lineno}"


#: every path that a Python process of the run (driver, trainer, worker, i-PI) opens for writing or makes
AUDIT = """
import os, sys
RECORD = os.open(os.environ["AUDIT_RECORD"], os.O_WRONLY | os.O_APPEND)

def watch(event, arguments):
    path = None
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        path = arguments[0]
    elif event in ("os.mkdir", "os.symlink", "os.link", "shutil.copyfile"):
        path = arguments[0] if event == "os.mkdir" else arguments[1]
    elif event == "os.rename":
        path = arguments[1]
    if isinstance(path, (str, bytes, os.PathLike)):
        os.write(RECORD, os.path.abspath(os.fsdecode(path)).encode() + b"\\n")

sys.addaudithook(watch)
"""


@pytest.mark.ipi
@pytest.mark.parametrize(("umask", "model"), [(0o027, "embedded"), (0o077, "toy")], ids=["027", "077"])
def test_a_run_writes_into_its_directory_alone_and_keeps_the_umask(tmp_path: Path, umask: int, model: str) -> None:
    project, home, scratch, elsewhere, site = (tmp_path / name for name in ("project", "home", "tmp", "elsewhere", "site"))
    for folder in (project, home, scratch, elsewhere, site):
        folder.mkdir()
    config = write_run(project, steps=3)
    if model == "embedded":
        text = config.read_text().replace('model = "toy"', 'model = "embedded"').replace('dtype = "float64"', 'dtype = "float32"')
        config.write_text(text)
    given = set(project.rglob("*"))
    (site / "sitecustomize.py").write_text(AUDIT)
    record = tmp_path / "record"
    record.touch()
    environment = os.environ | {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "TMPDIR": str(scratch),
        "PYTHONPATH": f"{site}:{ROOT}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "AUDIT_RECORD": str(record),
        "OMP_NUM_THREADS": "1",
    }
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):  # torch sets them in the process of a test that compiles
        environment.pop(name, None)
    done = subprocess.run(
        command("run", config), cwd=elsewhere, env=environment, umask=umask, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    run, cache = project / "run", home / "cache" / "bnn-driver"
    written = {Path(line) for line in record.read_text().splitlines()}
    assert any(path.is_relative_to(run / "ipi") for path in written), "i-PI was watched"
    assert any(path.is_relative_to(run / "generations") for path in written), "the trainer was watched"
    assert any(path.is_relative_to(run / "oracle" / "spool") for path in written), "the oracle's process was watched"
    config_folder, fonts, machine_code = (
        home / ".config",
        home / "cache" / "matplotlib",
        scratch / f"torchinductor_{getpass.getuser()}",
    )
    caches = (cache, config_folder / "matplotlib", fonts, machine_code)
    allowed = {Path("/dev/null"), cache.parent, config_folder}
    probes = {p for p in written if p.parent == scratch and not p.exists()}  # tempfile tries whether it can write there
    elsewhere_written = {p for p in written - allowed - probes if not any(p.is_relative_to(f) for f in (run, *caches))}
    assert not elsewhere_written, "\n".join(sorted(map(str, elsewhere_written)))
    assert not list(elsewhere.rglob("*"))
    assert not [p for p in scratch.rglob("*") if p.is_file()]
    assert {p for p in project.rglob("*") if not p.is_relative_to(run)} == given
    assert not [p for p in home.rglob("*") if p.is_file() and not any(p.is_relative_to(f) for f in caches)]
    for path in [run, *run.rglob("*")]:
        assert not stat.S_IMODE(path.lstat().st_mode) & umask, f"{path} is open to others"
    if model == "embedded":  # whose machine code is kept
        assert stat.S_IMODE(cache.stat().st_mode) & 0o022 == 0


@pytest.mark.ipi
def test_a_model_file_that_changed_is_refused(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=2)
    model = tmp_path / "my.model"
    model.write_bytes(EMBEDDED.read_bytes())
    config.write_text(config.read_text().replace('model = "toy"', 'model = "my.model"'))
    assert program("run", config).returncode == 0
    before = hashlib.sha256(model.read_bytes()).hexdigest()
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["physics"]["model"] == before
    module = torch.load(model, map_location="cpu", weights_only=False)
    with torch.no_grad():
        next(module.parameters()).mul_(1.0001)
    torch.save(module, model)
    after = hashlib.sha256(model.read_bytes()).hexdigest()
    for verb in ("run", "check"):
        refused = program(verb, config)
        assert refused.returncode == 2, refused.stderr
        assert f'model: was "{before}", now "{after}"' in refused.stderr
        assert "Restore the old values" in refused.stderr
    model.write_bytes(EMBEDDED.read_bytes())
    assert program("run", config).returncode == 0
