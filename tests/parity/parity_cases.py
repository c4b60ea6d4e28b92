"""Pytest plugin: the folder of parity cases, `--parity-dir DIR`."""
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
SHARED = TESTS.parents[1] / "shared" / "parity"


def pytest_addoption(parser):
    parser.addoption("--parity-dir", type=Path, help="folder of parity cases (default: the project's own)")


def cases(config) -> list[Path]:
    folder = config.getoption("--parity-dir")
    if folder is not None:
        return sorted(folder.glob("*.safetensors"))
    files = {p.name: p for p in (TESTS / "fixtures" / "parity").glob("*.safetensors")}
    files.update({p.name: p for p in SHARED.glob("*.safetensors")})
    return [files[name] for name in sorted(files)]


def pytest_generate_tests(metafunc):
    if "parity_file" in metafunc.fixturenames:
        files = cases(metafunc.config)
        metafunc.parametrize("parity_file", files, ids=[p.stem for p in files])
    if "parity_files" in metafunc.fixturenames:
        metafunc.parametrize("parity_files", [cases(metafunc.config)], ids=["all"])
