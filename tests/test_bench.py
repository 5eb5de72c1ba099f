"""`tnl bench`: every figure is there and belongs to the others; what cannot be measured is refused."""

import json

import pytest

TINY = ["--device", "cpu", "--json"]


def test_bench_generate_measures_both_models(tnl_command, tmp_path):
    file = tmp_path / "new" / "generate.json"
    options = ["--batch", "4,1", "--prompt-tokens", "8", "--new-tokens", "8", "--context", "16,64", "--positions", "20"]
    code, out, _ = tnl_command("bench", "generate", "tnl-tiny", *options, *TINY, file)
    assert code == 0
    figures = json.loads(file.read_text())
    for rows in (figures["rows"], figures["llama"]):
        assert [row["batch"] for row in rows] == [1, 4]
        for row in rows:
            assert row["decode_tokens_per_s"] == pytest.approx(row["batch"] / row["step_ms"] * 1e3)
    # A state of 3 layers of 3 heads of 64 x 64, doubled in the layer with LRPE; a cache of 3 layers of 16 tokens.
    assert [row["cache_gib"] * 2**30 for row in figures["rows"]] == [b * 4 * 3 * 64 * 64 * 4 for b in (1, 4)]
    assert [row["cache_gib"] * 2**30 for row in figures["llama"]] == [b * 3 * 2 * 16 * 192 * 4 for b in (1, 4)]
    assert [row["context"] for row in figures["contexts"]] == [16, 64]
    assert {row["batch"] for row in figures["generate"]} >= {1}
    assert figures["positions"]["state_bytes"] == 4 * 3 * 64 * 64 * 4
    best = [max(row["decode_tokens_per_s"] for row in figures[key]) for key in ("rows", "llama")]
    assert figures["times_llama"] == pytest.approx(best[0] / best[1])
    assert f"{figures['times_llama']:.2f} times the LLaMA" in out
    # A CPU's bandwidth is not what limits it.
    assert figures["rows"][0]["floor_ms"] is None


def test_bench_prefill_measures_both_models(tnl_command, tmp_path):
    file = tmp_path / "prefill.json"
    code, out, _ = tnl_command("bench", "prefill", "tnl-tiny", "--tokens", "64,16", *TINY, file)
    assert code == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["tokens"] for row in rows] == [16, 64]
    for row in rows:
        assert row["llama_flash_times_tnl"] == pytest.approx(row["llama_flash_ms"] / row["tnl_ms"])
    assert "LLaMA on flash" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "tnl-tiny", "--batch", "1,x"], "--batch: '1,x' is no list of whole numbers of at least 1"),
        (["generate", "tnl-tiny", "--batch", "0"], "--batch: '0' is no list"),
        (["generate", "tnl-tiny", "--batch", ","], "--batch: ',' is no list"),
        (["generate", "tnl-tiny", "--json", "."], "--json: . is a folder; name a file"),
        (["prefill", "tnl-tiny", "--json", "."], "--json: . is a folder; name a file"),
        (["generate", "tnl-9b"], "model/tnl-9b: no such file"),
        (["generate", "tnl-tiny", "--new-tokens", "2"], "--new-tokens"),
        (["prefill", "tnl-tiny", "--tokens", "-5"], "--tokens: '-5' is no list"),
        (["prefill", "tnl-tiny", "--device", "tpu"], "--device: 'tpu'"),
    ],
)
def test_what_cannot_be_measured_is_refused(tnl_command, arguments, message):
    code, _, err = tnl_command("bench", *arguments)
    assert code == 2
    assert message in err
