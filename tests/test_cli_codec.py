"""`vllm-turboquant codec`: what it prints, writes, draws and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from vllm_turboquant import __version__
from vllm_turboquant.cli import app
from vllm_turboquant.cli import codec as codec_module
from vllm_turboquant.cli.codec import draw, load_vectors
from vllm_turboquant.distortion import Report, measure_all, random_vectors

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = ["--head-dim", "64", "--num-vectors", "512"]


def run(*arguments: object) -> str:
    """Run the command, return what it prints."""
    result = CliRunner().invoke(app, ["codec", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def refusal(*arguments: object) -> str:
    """Run a command that has to be refused, return its last line: the reason."""
    result = CliRunner().invoke(app, ["codec", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    return result.output.splitlines()[-1]


def keys(num_vectors: int = 600, dim: int = 64) -> Tensor:
    return random_vectors("key-like", num_vectors, dim, seed=0).float()


@pytest.fixture
def npy(tmp_path: Path) -> Path:
    """600 key-like vectors of 64 coordinates."""
    path = tmp_path / "keys.npy"
    np.save(path, keys().numpy())
    return path


@pytest.fixture
def safetensors(tmp_path: Path) -> Path:
    """Two tensors, "key" and "value"."""
    path = tmp_path / "kv.safetensors"
    value = random_vectors("Gaussian", 300, 64, seed=0).float()
    save_file({"key": keys().bfloat16(), "value": value}, path)
    return path


def test_help_imports_neither_torch_nor_vllm() -> None:
    program = (
        "import sys\n"
        "from vllm_turboquant.cli import main\n"
        "sys.argv = ['vllm-turboquant', '--help']\n"
        "try:\n    main()\n"
        "finally:\n    print([name for name in ('torch', 'vllm') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "codec " in found.stdout
    assert found.stdout.splitlines()[-1] == "[]"


def test_runs_as_a_module() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "vllm_turboquant.cli", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == f"{__version__}\n"


def test_tables_show_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "codec.json"
    printed = run(*FEW, "--json", file)
    report = TypeAdapter(Report).validate_python(without_version(file))
    assert "512 vectors of head_dim 64, Gaussian, seed 0" in printed
    for row in report.mse:
        assert row.published is not None
        line = next(line for line in printed.splitlines() if f"│    {row.bits} │" in line)
        measured, expected, published = (cell.strip() for cell in line.split("│")[2:5])
        mean, error = map(float, measured.split(" ± "))
        assert mean == pytest.approx(row.squared_error.mean, abs=error)
        assert error == pytest.approx(row.squared_error.error, rel=0.51)  # one digit
        assert float(expected) == pytest.approx(row.expected, rel=1e-3)
        assert float(published) == row.published
    for name in {row.code for row in (*report.codes, *report.distances)}:
        assert f"│ {name} " in printed
    key_like = "as in real keys |mean| is 0.75 of the rms norm and 4 outlier channels"
    assert key_like in " ".join(printed.split())
    centering = printed.split("Centering")[1]
    assert "key-like" in centering
    assert "Gaussian" not in centering  # its mean is small
    assert max(map(len, printed.splitlines())) <= codec_module.PIPED_WIDTH


def without_version(file: Path) -> dict[str, object]:
    content = json.loads(file.read_text())
    assert content.pop("version") == __version__
    return dict(content)


def test_json_schema(tmp_path: Path) -> None:
    """Written out, because scripts read it: changing a name here is a change for them."""
    file = tmp_path / "codec.json"
    run(*FEW, "--seed", 5, "--json", file)
    content = json.loads(file.read_text())
    fidelity = {
        *("code", "bits", "squared_error", "product_error", "bias", "variance"),
        *("bound", "expected", "published"),
    }
    assert set(content) == {
        *("version", "data", "head_dim", "num_vectors", "seed"),
        *("mse", "prod", "codes", "distances", "centering"),
    }
    assert (content["data"], content["head_dim"], content["num_vectors"], content["seed"]) == (
        *("Gaussian", 64, 512, 5),
    )
    for table, rows in (("mse", 4), ("prod", 4), ("codes", 6)):
        assert len(content[table]) == rows
        for row in content[table]:
            assert set(row) == fidelity
            assert set(row["squared_error"]) == {"mean", "error"}
    assert len(content["distances"]) == 10
    assert set(content["distances"][0]) == {"code", "data", "correlation"}
    assert [set(row) for row in content["centering"]] == 2 * [
        {"data", "mean_share", "error", "centered_error"}
    ]
    assert TypeAdapter(Report).validate_python(without_version(file)) == measure_all(
        random_vectors("Gaussian", 512, 64, seed=5), None, seed=5
    )


def test_the_seed_fixes_everything(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b", "c")]
    printed = [
        run(*FEW, "--seed", seed, "--json", file)
        for file, seed in zip(files, (1, 1, 2), strict=True)
    ]
    assert printed[0] == printed[1] != printed[2]
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


def test_defaults(tmp_path: Path) -> None:
    file = tmp_path / "codec.json"
    run("--json", file)
    content = json.loads(file.read_text())
    assert (content["head_dim"], content["num_vectors"], content["seed"]) == (128, 8192, 0)


def test_data_from_npy(npy: Path, tmp_path: Path) -> None:
    file = tmp_path / "codec.json"
    printed = run("--data", npy, "--num-vectors", 500, "--json", file)
    assert "500 vectors of head_dim 64, keys.npy, seed 0" in printed
    assert "keys.npy" in printed.split("Centering")[1]
    content = json.loads(file.read_text())
    assert content["data"] == "keys.npy"
    assert content["num_vectors"] == 500
    assert content["centering"][0]["mean_share"] == pytest.approx(0.75, abs=0.02)


def test_a_name_is_not_markup(npy: Path) -> None:
    odd = npy.rename(npy.with_name("[bold]keys.npy"))
    printed = run("--data", odd)
    assert printed.count("[bold]keys.npy") == 3  # first line, distances, centering


def test_data_from_safetensors(safetensors: Path) -> None:
    printed = run("--data", safetensors, "--tensor", "key")
    assert "600 vectors of head_dim 64, kv.safetensors:key, seed 0" in printed


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8"])
def test_npy_dtypes_and_leading_axes(dtype: str, tmp_path: Path) -> None:
    """Fortran order, big-endian and half precision included; leading axes are flattened."""
    values = keys().numpy().reshape(100, 6, 64)
    np.save(tmp_path / "x.npy", np.asfortranarray(values.astype(dtype)))
    loaded = load_vectors(tmp_path / "x.npy", None)
    assert torch.equal(loaded, torch.from_numpy(values.astype(dtype[1:])).reshape(600, 64))


def test_safetensors_dtypes(safetensors: Path, tmp_path: Path) -> None:
    assert torch.equal(load_vectors(safetensors, "key"), keys().bfloat16())
    save_file({"only": keys().half()[None]}, tmp_path / "one.safetensors")
    assert torch.equal(load_vectors(tmp_path / "one.safetensors", None), keys().half())


def test_plot(npy: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")):
        run(*FEW, "--plot", tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    run("--data", npy, "--plot", tmp_path / "data.png")
    assert (tmp_path / "data.png").read_bytes() != (tmp_path / "a.png").read_bytes()


def test_plot_shows_everything() -> None:
    pytest.importorskip("matplotlib")
    vectors = random_vectors("Gaussian", 512, 64, seed=0)
    report = measure_all(vectors, None, seed=0)
    left, right = draw(report, None).axes
    labels = [text.get_text() for axes in (left, right) for text in axes.get_legend().get_texts()]
    found = {row.code: row.correlation.mean for row in report.distances if row.data == "key-like"}
    assert labels == [
        "TurboQuant_prod, product error times d",
        "TurboQuant_mse, squared error",
        "as printed in arXiv 2504.19874",
        "bound, $4^{-bits}$",
        "turboquant3 key",
        "QJL, orthogonal S",
        "turboquant3 value",
        *(
            f"{name}: {found[name]:.3f}"
            for name in ("absmax, 7 levels", "rotated, Lloyd-Max", "turboquant3 key, centered")
        ),
        "exact: 1",
    ]
    assert left.get_yscale() == "log"
    for axes in (left, right):
        assert axes.get_title()
        assert axes.get_xlabel()
        assert axes.get_ylabel()
    low, high = left.get_ylim()
    shown = [value for line in left.lines for value in line.get_ydata()]
    assert low < min(shown)
    assert max(shown) < high
    _, data_right = draw(measure_all(vectors, "mine.npy", seed=0), vectors).axes
    assert "mine.npy" in data_right.get_title()


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(codec_module, "find_spec", lambda name: None)
    reason = refusal("--plot", tmp_path / "a.png")
    assert reason.endswith("needs matplotlib; install it with: pip install 'vllm-turboquant[plot]'")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--head-dim", "100"], "does not support head_dim 100; supported: 64, 128, 256, 384, 512"),
        (["--num-vectors", "10"], "10 vectors are too few to estimate errors from; give at least"),
        (["--num-vectors", "-1"], "-1 vectors are too few to estimate errors from; give at least"),
        (["--head-dim", "0"], "does not support head_dim 0; supported: 64, 128, 256, 384, 512"),
        (["--tensor", "key"], "--tensor names a tensor of a file; give the file with --data"),
        (["--json", "no/a.json"], "--json: the folder no does not exist; create it first"),
        (["--plot", "no/a.png"], "--plot: the folder no does not exist; create it first"),
        (["--json", "."], "--json: . is a folder; name a file in it"),
        (["--plot", "."], "--plot: . is a folder; name a file in it"),
        (["--plot", "a.gif"], "--plot: a.gif is no .png, .svg or .pdf file; give it one of these"),
        (["--data", "no.npy"], "no.npy is not a file; give a .npy or .safetensors file"),
        (["--data", "."], ". is not a file; give a .npy or .safetensors file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_arguments(arguments: list[str], reason: str) -> None:
    assert reason in refusal(*arguments)


def test_refused_choices_of_data(npy: Path, safetensors: Path) -> None:
    for arguments, reason in (
        (["--head-dim", 128], "its vectors have 64 coordinates; leave out --head-dim 128"),
        (["--num-vectors", 601], "it has 600 vectors; --num-vectors 601 is more than that"),
        (
            ["--num-vectors", -1],
            "-1 vectors are too few to estimate errors from; give at least 256",
        ),
        (["--tensor", "key"], "a .npy file has one array without a name; leave out --tensor key"),
    ):
        assert refusal("--data", npy, *arguments).endswith(f"--data: {reason}")
    several = "kv.safetensors has 2 tensors; choose with --tensor: key, value"
    assert refusal("--data", safetensors).endswith(several)
    unknown = "kv.safetensors has no tensor query; choose one of: key, value"
    assert refusal("--data", safetensors, "--tensor", "query").endswith(unknown)


def test_a_long_list_of_tensors_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "many.safetensors"
    save_file({f"t{n:02}": torch.zeros(1, 64) for n in range(11)}, path)
    assert refusal("--data", path).endswith("t07, t08, t09, ...")


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("x.npy", np.zeros((600, 64), dtype=np.int32), "x.npy holds int32; accepted: float16, bf"),
        ("x.npy", np.ones(64, dtype=np.float32), "x.npy holds shape (64,); accepted: [..., head"),
        ("x.npy", np.ones((600, 0), dtype=np.float32), "does not support head_dim 0; supported"),
        ("x.npy", np.ones((0, 64), dtype=np.float32), "0 vectors are too few to estimate errors"),
        ("x.npy", np.full((600, 64), np.nan, dtype=np.float32), "600 of 600 vectors are not fin"),
        ("x.npy", np.zeros((600, 64), dtype=np.float32), "600 of 600 vectors have coordinates of"),
        ("x.npy", np.array([{}]), "x.npy is not a readable .npy file of numbers (Object arrays"),
        ("x.npy", np.array(["a"]), "x.npy is not a readable .npy file of numbers (can't convert"),
        ("x.npy", b"", "x.npy is not a readable .npy file of numbers (EOF"),
        ("x.npy", b"PK\x03\x04 no npy", "x.npy is not a readable .npy file of numbers (the magic"),
        ("x.safetensors", b"\x09", "x.safetensors is not a readable .safetensors file ("),
        ("x.bin", b"", "x.bin is neither a .npy nor a .safetensors file; convert it"),
    ],
    ids=[
        *("integers", "one axis", "no coordinates", "no vectors", "NaN", "zeros", "objects"),
        *("strings", "empty", "another format", "damaged", "another ending"),
    ],
)
def test_refused_files(name: str, array: np.ndarray | bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(array, bytes):
        path.write_bytes(array)
    else:
        np.save(path, array)
    found = refusal("--data", path)
    assert f"--data: {reason}" in found or f"--data: turboquant3 {reason}" in found
