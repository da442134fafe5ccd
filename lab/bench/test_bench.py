"""lab/bench: the layouts it compares compute the same, what it counts is right, it writes its files. No times."""

import json
import types

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

import data
from lab.bench import __main__ as bench
from lab.bench import cases, rivals

P, G, C = 64, 4, 5  # prefix tokens, CoTs per video, CoT tokens


@pytest.fixture(scope="module")
def world():
    settings = bench.Settings(hidden=32, layers=2, cot_tokens=C, repeats=1, released_micro=2)
    return cases.make_world(settings)


@pytest.fixture(scope="module")
def rows(world):
    return {row["layout"]: row for row in bench.run_cell(world, P, G, C, cases.LAYOUTS)}


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts_agree(rows, layout):
    if isinstance(why := rows[layout]["seconds"], str):
        pytest.skip(why)
    assert rows[layout]["loss differs"] < 1e-4
    assert rows[layout]["gradient differs"] < 1e-4


@pytest.mark.parametrize("rival", cases.RIVALS)
def test_rivals_see_what_the_drawing_allows(world, rival, monkeypatch):
    """Rows of unequal length, without gradients: on a CPU FlexAttention has none. Compiling it is left out here."""
    monkeypatch.setattr(rivals, "_compiled", lambda: flex_attention)
    if rival == "prefix grouper":
        pytest.importorskip("prefix_grouper", reason="pip install -r requirements-bench.txt")
    prefixes = [cases.make_prefix(world.processor, length, 0) for length in (70, 64)]
    cots = [[[1] * 5, [2, 3, 4], [5]], [[6, 7], [8] * 9]]
    batch = bench.lay_out(world.model.backbone, prefixes, cots)
    with torch.no_grad():
        ours = world.model(batch)
        with cases.attention(world.model, rival):
            theirs = world.model(batch)
        again = world.model(batch)
    torch.testing.assert_close(theirs.log_probs, ours.log_probs, atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs.rewards, ours.rewards, atol=1e-5, rtol=0)
    assert torch.equal(again.log_probs, ours.log_probs)  # and ours is back


def test_a_wrong_layout_is_noticed(world):
    """The comparison must be able to fail: other CoTs, other loss and gradient."""
    rollouts = [cases.make_rollouts(world.processor, P, G, C, seed) for seed in (0, 1)]
    one, other = (cases.case_of(world, "plain", each) for each in rollouts)
    _, right = cases.inspect(world.model, one)
    found, _ = cases.inspect(world.model, other, right)
    assert found["gradient differs"] > 1e-2


def test_tokens_by_hand(rows):
    """Each video: prefix 64, 4 CoTs of 5 + 1 tokens. Once, or packed: 64 + 24 = 88, once for the
    reference, once for the policy, two videos: 352.
    Plain: 4 * (64 + 6) = 280, times four: 1,120. Released: four passes instead of two: 2,240."""
    counted = {layout: row["tokens"] for layout, row in rows.items() if "tokens" in row}
    others = dict.fromkeys(set(counted) & set(cases.RIVALS), 352)
    assert counted == {"once": 352, "packed": 352, "plain": 1120, "released": 2240} | others
    assert all(row["ideal tokens"] == 352 for row in rows.values() if "tokens" in row)
    # A backward counts as two forwards: ours 88 * 4 units, plain 280 * 4, released 280 * (4 forwards + 2 * 2).
    assert rows["once"]["x plain by tokens"] == pytest.approx(280 / 88)
    assert rows["once"]["x released by tokens"] == pytest.approx(280 * 8 / (88 * 4))
    once = rows["once"]
    assert once["x plain, share of tokens"] == pytest.approx(once["x plain"] * 88 / 280)


def test_flops_by_hand(world):
    """One video, one CoT: 2 * weights * tokens + attention + lm_head; hidden 32, 2 layers, 2 heads of 16, 1 KV head."""
    prefix = cases.make_prefix(world.processor, P, 0)
    one = cases.forward_flops(world.model, prefix, [C])
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 96  # q, k and v, o, and the three of the MLP
    tokens, words = P + C + 1, world.model.backbone.lm_head.weight.shape[0]
    pairs = tokens * (tokens + 1) / 2  # one CoT: plain causal attention
    assert one["linear"] == 2 * 2 * layer * tokens
    assert one["attention"] == 4 * 32 * 2 * pairs and one["lm_head"] == 2 * 32 * words * C
    two = cases.forward_flops(world.model, prefix, [C, C])
    row = C + 1  # a second CoT: its own tokens see the prefix and themselves
    assert two["linear"] - one["linear"] == 2 * 2 * layer * row
    assert two["attention"] - one["attention"] == 4 * 32 * 2 * (row * P + row * (row + 1) / 2)
    assert two["lm_head"] == 2 * one["lm_head"] and two["vision"] == one["vision"]


def test_flops_agree_with_pytorch(world):
    """PyTorch's own counter on a plain forward. It sees no attention on a CPU, so that is left out on our side too."""
    from torch.utils.flop_counter import FlopCounterMode

    prefix = cases.make_prefix(world.processor, P, 0)
    batch = bench.lay_out(world.model.backbone, [prefix], [[[1] * C]])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        world.model(batch)
    linear = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    flops, tower = cases.forward_flops(world.model, prefix, [C]), world.model.backbone.model.visual.config
    steps, height, width = prefix["video_grid_thw"][0].tolist()
    flops["vision"] -= 4 * tower.hidden_size * tower.depth * steps * (height * width) ** 2
    assert linear == pytest.approx(flops["linear"] + flops["lm_head"] + flops["vision"], rel=0.01)


def test_prefix_has_the_length_asked_for(world):
    for length in (50, 64, 200):
        prefix = cases.make_prefix(world.processor, length, 0)
        assert len(prefix["input_ids"]) == len(prefix["mm_token_type_ids"]) == length
    with pytest.raises(data.InputError, match="too short"):
        cases.make_prefix(world.processor, 20, 0)


def test_peak_memory_counts_bytes():
    """Three float32 of a million numbers live at the same time, never four: 12 MB."""

    def work():
        a = torch.zeros(1_000_000)
        b = a + 1
        del a
        c = b + 1
        return b.sum() + (c + 1).sum()

    if not torch.cuda.is_available():
        assert cases.with_peak(work)[1] == pytest.approx(12e6, rel=0.01)


def test_rounds_are_interleaved_and_rotated():
    order = []
    times = cases.measure({name: lambda name=name: order.append(name) for name in "abc"}, 3)
    assert "".join(order) == "abcbcacab"
    assert all(len(seconds) == 3 for seconds in times.values())
    assert cases.speed_up([1.0, 2.0, 4.0], [2.0, 6.0, 8.0]) == 2.0  # 2, 3 and 2 times


def test_rivals_of_the_metric_agree():
    world = types.SimpleNamespace(settings=bench.Settings(repeats=1))
    assert all(row["differs"] < 1e-12 for row in bench.metric(world))


def test_a_run_writes_its_files(tmp_path, capsys):
    sizes = ["--hidden", "32", "--layers", "2", "--cot-tokens", "13", "--repeats", "1"]
    bench.main(["--quick", "--out", str(tmp_path), "--only", "stage2,stage1", *sizes])
    results = json.loads((tmp_path / "bench.json").read_text())
    *measured, last = results["stage2"]
    assert [row["layout"] for row in measured] == list(cases.LAYOUTS)
    assert len(measured[0]["seconds"]) == 1 and "TRL" in last["layout"]
    assert {row["layout"] for row in results["stage1"]} == {"one batch", "two forwards"}
    assert all(row["gradient differs"] < 1e-4 for row in results["stage1"])
    text = (tmp_path / "bench.md").read_text()
    assert "| once |" in text and "| packed |" in text and text.split("\n\n")[-1].strip() in capsys.readouterr().out
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"


def test_bad_flags(tmp_path):
    with pytest.raises(data.InputError, match="choose from stage2"):
        bench.main(["--out", str(tmp_path), "--only", "stage3"])
    with pytest.raises(SystemExit) as error:
        bench.main(["--fast"])
    assert error.value.code == 2
