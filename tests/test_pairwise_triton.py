"""The Triton kernels against the torch path. Without a GPU in Triton's interpreter, on the CPU, and through Triton's
compiler; as either is chosen when triton is imported, each is one subprocess: this file run as a program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pair_problem import Problem, make_problem
from torch import Tensor

from vlcl.losses import pairwise

SMALL_CARD = 48 * 1024  # bytes of shared memory that a block may have on any card
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@dataclass
class Case:
    """A problem; `small`: in small tiles and blocks, so that there are several of everything."""

    options: dict[str, Any] = field(default_factory=dict)
    small: bool = False
    edit: Any = lambda problem: None


def oppose(p: Problem) -> None:
    """Scale 100, each pair at cosine -1, offsets relative to that: e^{200} must never be formed."""
    p.text_CD, p.scale_GK, p.offset_GK = -p.image_CD, torch.full_like(p.scale_GK, 100.0), -100 + p.offset_GK


def break_one(p: Problem) -> None:
    p.image_CD[p.start + 3, 1] = torch.nan


CASES = {
    "a block": Case({"own": 5, "width": 3}),
    "duplicates and a bank": Case(
        {"own": 33, "left": 33, "right": 33, "bank": 40, "width": 20, "names": 60, "with_bank": True}
    ),
    "a bank for the statistics": Case({"own": 33, "left": 7, "bank": 9, "width": 20}, small=True),
    "several blocks": Case({"own": 70, "left": 70, "width": 64}),
    "many small blocks": Case(
        {"own": 20, "left": 15, "right": 11, "bank": 21, "width": 130, "names": 50, "with_bank": True}, small=True
    ),
    "shares of the candidates": Case({"own": 5, "left": 70, "right": 60, "width": 20, "bank": 8}, small=True),
    "the cap": Case({"own": 33, "left": 4, "width": 20, "cap": 1.0}),
    "softplus": Case({"own": 33, "left": 20, "bank": 9, "width": 20, "names": 40, "kind": "softplus"}, small=True),
    "softplus and a bank": Case({"own": 20, "bank": 30, "width": 20, "kind": "softplus", "with_bank": True}),
    "no negatives": Case({"own": 5, "left": 3, "width": 20, "names": 1}),
    "only an empty bank": Case({"own": 1, "bank": 1, "width": 20, "with_bank": True}),
    "opposed at scale 100": Case({"own": 20, "left": 5, "width": 20}, edit=oppose),
    "no number": Case({"own": 20, "left": 5, "width": 20}, edit=break_one),
    "relative": Case({"own": 33, "left": 5, "width": 70, "relative": True}, small=True),
}


def errors_of(case: Case, device: str) -> dict[str, float]:
    """By result, the largest difference from torch's operations, relative to the result's size."""
    from vlcl.losses import pairwise_triton as kernels

    p = make_problem(**case.options)
    case.edit(p)
    p = p.to(torch.float32).to(device)
    with pytest.MonkeyPatch.context() as patch:
        if case.small:
            patch.setattr(kernels, "BLOCK", {"BLOCK_R": 16, "BLOCK_C": 16, "num_warps": 4})
            patch.setattr(kernels, "SHARE", 32)
            for name, value in {"TILE": 2000, "WIDTH": 50}.items():
                patch.setattr(pairwise, name, dict.fromkeys(("cpu", "cuda"), value))
        expected_total, expected_sums, expected_grads = pairwise._walk(*arguments(p, "torch"))
        p.kernels = "torch"
        expected = p.statistics()
        patch.setattr(pairwise, "_on_tiles", lambda *_: kernels)
        total, sums, grads = pairwise._walk(*arguments(p, "triton"))
        found = p.statistics()
    weight_BK = expected_sums.weight_BK
    errors = {
        "total": difference(total, expected_total),
        "weight": difference(sums.weight_BK, weight_BK),
        "cosine": difference(sums.cosine_BK, expected_sums.cosine_BK, weight_BK),
        "square": difference(sums.square_BK, expected_sums.square_BK),
        "log_sum": difference(found.log_sum_BK, expected.log_sum_BK, torch.ones(())),
        "log_square": difference(found.log_square_BK, expected.log_square_BK, torch.ones(())),
    }
    for name, got, wanted in zip(("image", "text"), grads, expected_grads):
        known = wanted.nan_to_num(0.0)
        size_B1 = known.norm(dim=1, keepdim=True) + 1e-6 * known.norm()
        errors[name] = difference(got, wanted, size_B1)
    return errors


def arguments(p: Problem, kernels: Any) -> tuple[Any, ...]:
    p.kernels = kernels
    return *(x[p.ours] for x in (p.image_CD, p.text_CD, p.scale_GK, p.offset_GK)), p.weighing


def difference(got: Tensor, expected: Tensor, size: Tensor | None = None) -> float:
    """0 where both are the same infinity or no number; infinity where one is and not the other."""
    size = (expected if size is None else size).abs().to(expected).nan_to_num(0.0)
    same = (got == expected) | (got.isnan() & expected.isnan())
    relative = ((got - expected).abs() / (size + 1e-30)).nan_to_num(torch.inf, torch.inf)
    return relative.masked_fill(same, 0.0).max().item()


def assert_small(errors: dict[str, float], tolerance: float = 1e-4) -> None:
    assert not {name: error for name, error in errors.items() if not error <= tolerance}


def as_a_program(what: str, **environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, __file__, what], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    pytest.importorskip("triton", reason="triton is not installed")
    return as_a_program("interpret", TRITON_INTERPRET="1")


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_give_what_torch_gives(name: str, interpreted: dict[str, dict[str, float]]) -> None:
    assert_small(interpreted[name])


@pytest.mark.skipif(os.environ.get("VLCL_TEST_EVERYTHING") != "1", reason="make test-all")
def test_the_kernels_compile_for_gpus_old_and_new_and_fit_into_a_small_one(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    shared = as_a_program("compile", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert shared
    assert not {name: size for name, size in shared.items() if size > SMALL_CARD}


def compile_kernels() -> dict[str, int]:
    """Bytes of shared memory of a block, by kernel, arithmetic and compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vlcl.losses import pairwise_triton as kernels

    shared = {}
    for capability, weighs, softplus, anchors in [
        (80, False, False, True), (80, True, False, True), (80, True, True, False), (90, False, False, False),
        (90, True, False, False), (90, True, True, True),
    ]:  # fmt: skip
        kernel = kernels._weigh_kernel if weighs else kernels._sum_kernel
        constants: dict[str, Any] = {**kernels.BLOCK, "OWN": anchors}
        constants |= {"SOFTPLUS": softplus, "ANCHORS": anchors} if weighs else {}
        options = {"num_warps": constants.pop("num_warps")}
        signature, attributes = {}, {}
        for i, argument in enumerate(kernel.arg_names):
            types = {"row_x_ptr": "*i64", "row_y_ptr": "*i64"}
            kind = types.get(argument, "*fp32" if argument.endswith("_ptr") else "fp32" if argument == "cap" else "i32")
            signature[argument] = "constexpr" if argument in constants else kind
            if signature[argument].startswith("*"):
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        shared[f"{kernel.__name__} {softplus} {anchors} sm_{capability}"] = built.metadata.shared
    return shared


@on_cuda
@pytest.mark.parametrize("name", CASES)
def test_kernels_on_a_gpu_give_what_torch_gives(name: str) -> None:
    assert_small(errors_of(CASES[name], "cuda"))


LARGE = {"own": 1000, "left": 500, "right": 333, "bank": 70, "names": 2000, "with_bank": True}


@on_cuda
@pytest.mark.parametrize("width", [512, 1000])
@pytest.mark.parametrize("kind", ["exp", "softplus"])
@pytest.mark.parametrize("size", [1 << 18, 1 << 24])
def test_kernels_on_a_gpu_at_the_size_of_a_step(
    width: int, kind: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pairwise.TILE, "cuda", size)
    assert_small(errors_of(Case({**LARGE, "width": width, "kind": kind}), "cuda"))


@on_cuda
def test_on_a_gpu_the_choice_of_kernels_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    p = make_problem(**LARGE, width=512, relative=True).to(torch.float32).to("cuda")
    grads = {}
    for tf32 in (False, True):
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
        for name in ("torch", "triton"):
            p.kernels = name
            leaves = p.leaves()
            runs = [torch.autograd.grad(p.weighted_sum(*leaves)[0], leaves) for _ in range(2)]
            grads[name, tf32] = runs[0]
            if name == "triton":
                assert all(torch.equal(a, b) for a, b in zip(*runs))  # no atomics: the same bits
    for key, got in grads.items():
        for a, b in zip(got, grads["torch", False]):
            assert (a - b).norm() / b.norm() < (2e-2 if key[1] else 1e-4)


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        print(json.dumps(compile_kernels()))
    else:
        print(json.dumps({name: errors_of(case, "cpu") for name, case in CASES.items()}))
