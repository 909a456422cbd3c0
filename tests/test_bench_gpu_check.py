"""The GPU's checks in miniature on a CPU: their own code works, and a wrong number is a FAIL."""

import pytest
import torch

from bench import gpu_check, gpu_correct, gpu_speed, measuring
from bench.measuring import Report
from engine import head


@pytest.mark.skipif(torch.cuda.is_available(), reason="in miniature only without a GPU")
@pytest.mark.parametrize("section", gpu_check.SECTIONS)
def test_a_section_in_miniature(section, capsys):
    passed = gpu_check.main([section])
    printed = capsys.readouterr().out
    verdicts = [line for line in printed.splitlines() if line.startswith(("PASS", "FAIL"))]
    assert passed, printed
    assert printed.startswith(f"{section} on CPU: in miniature") and len(printed.splitlines()) > 1 + len(verdicts)
    assert verdicts or section in ("kernels", "block", "memory")  # whose bounds are all a GPU's


def test_a_wrong_number_fails(monkeypatch, capsys):
    """The policy's log-probs a thousandth too high: off 3 ln 2, and off the exact numbers."""
    token_logps = head.token_logps

    def wrong(hidden, weight, targets):
        found = token_logps(hidden, weight, targets)
        return found * 0.999 if torch.is_grad_enabled() else found

    monkeypatch.setattr(head, "token_logps", wrong)
    assert not gpu_check.main(["correct"])
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert any("first loss" in line for line in failed) and any("float32 packed, RMS" in line for line in failed)


def test_every_path_of_training_is_checked():
    """Plain and packed, both dtypes, compiled or not, recomputed or not."""
    kinds = {(p.dtype, p.packed, p.compiled, p.recomputed > 0) for p in gpu_correct.PATHS}
    bf16 = torch.bfloat16
    assert {(bf16, True, compiled, again) for compiled in (True, False) for again in (True, False)} <= kinds
    assert {(dtype, packed, False, False) for dtype in (bf16, torch.float32) for packed in (True, False)} <= kinds


def test_bounds_by_hand(capsys):
    report = Report("x")
    report.at_most("a", 2.0, 2.0)
    report.at_least("b", 1.0, 1.5)
    assert not report.finish()
    assert capsys.readouterr().out == "PASS x: a: 2, at most 2\nFAIL x: b: 1, at least 1.5\n"


def test_a_part_that_breaks_off_leaves_the_verdicts_of_those_before_it(monkeypatch, capsys):
    def broken(s, report):
        report.at_most("a", 1.0, 2.0)
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(gpu_check.SECTIONS, "kernels", broken)
    with pytest.raises(RuntimeError, match="no kernel image"):
        gpu_check.main(["kernels"])
    assert "PASS kernels: a: 1, at most 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, kind",
    [
        ("void pytorch_flash::flash_bwd_kernel<Flash_bwd_kernel_traits<128, cutlass::bfloat16_t>>", "attention"),
        ("triton_red_fused__to_copy__unsafe_view_add_mean_mul_pow_rsqrt_7", "triton"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_256x128_32x3_tn_align8>", "matmul"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "matmul"),
        ("Memcpy HtoD (Pinned -> Device)", "copies and indexing"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "other"),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert gpu_speed.kind_of(name) == kind


def test_each_measured_step_runs_the_tower(monkeypatch):
    """A row keeps what the tower made of its pictures; measured again, the same row would be faster than training."""
    s = measuring.sizes()
    model = measuring.adapted_model(s.small, torch.float32, s.device)
    row = measuring.fill_row(measuring.examples(s.small, 1, s.prompt, s.response), tokens=1)
    seen, tower = [], type(model.vision_tower).forward
    monkeypatch.setattr(type(model.vision_tower), "forward", lambda t, x: seen.append(len(x)) or tower(t, x))
    gpu_speed.step(model, row)
    gpu_speed.step(model, row)
    assert seen == [2, 2]  # m_w and m_l
