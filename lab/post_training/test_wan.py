"""Post-training on a tiny random Wan: diffusers' own classes, and its own sampler as the twin of ours."""

import json
import shutil
import sys

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed; pip install -r requirements-wan.txt")
from diffusers import (  # noqa: E402
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,  # noqa: E402
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel  # noqa: E402

import data  # noqa: E402
import losses  # noqa: E402
import parallel  # noqa: E402
from lab.post_training import wan  # noqa: E402
from plumbing.settings import InputError  # noqa: E402
from plumbing.video import open_clip  # noqa: E402
from tests.conftest import refuses, run, write_csv  # noqa: E402

PROMPTS = ["a red circle moves left", "a blue square stands still"]
SMALL = {"frames": 9, "height": 16, "width": 16, "steps": 4, "group": 2, "lora_r": 4, "batch": 2}


def tiny_transformer(in_channels=16):
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=in_channels, out_channels=16,
        text_dim=32, freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def tiny_pipeline(processor):
    """Sizes of diffusers' own test of Wan."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                           temperal_downsample=[False, True, True])
    transformer = tiny_transformer()
    tokenizer = processor.tokenizer
    config = UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return WanPipeline(tokenizer=tokenizer, text_encoder=UMT5EncoderModel(config).eval(), vae=vae.eval(),
                       transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))


@pytest.fixture(scope="module")
def wan_dir(processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    tiny_pipeline(processor).save_pretrained(folder)
    return str(folder)


def tiny_wan(processor, trained=False, **flags):
    """With `trained` the LoRA is not at its start, where it changes nothing."""
    made = wan.Wan(tiny_pipeline(processor), PROMPTS, wan.Settings(**{**SMALL, **flags}))
    if trained:
        torch.manual_seed(1)
        for parameter in made.trained:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def test_only_the_lora_is_trained(processor):
    made = tiny_wan(processor, width=32)
    names = [name for name, p in made.transformer.named_parameters() if p.requires_grad]
    assert names and all(".lora_" in name for name in names) and len(names) == 2 * 2 * 2 * 4  # A, B; layers; attentions
    scalings = {m.scaling["default"] for m in made.transformer.modules() if hasattr(m, "lora_A")}
    assert scalings == {2.0}  # alpha / r
    assert made.pipe.text_encoder is None and made.shape == (1, 16, 3, 2, 4)  # wider than high


class ShiftedOnce(FlowMatchEulerDiscreteScheduler):
    """diffusers' own, told the even grid: by itself it takes the range from sigmas that are shifted already."""

    def set_timesteps(self, steps, device=None, **more):
        super().set_timesteps(sigmas=[1 - k / steps for k in range(steps)], device=device)


def test_the_times_are_diffusers_of_an_even_grid(processor):
    made, theirs = tiny_wan(processor, steps=10), ShiftedOnce(shift=3.0)
    theirs.set_timesteps(10)
    assert made.times == pytest.approx(theirs.sigmas.tolist(), abs=1e-6) and made.times[-2] == pytest.approx(0.25)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_without_noise_our_sampler_is_wan_s_own(processor, guidance):
    """Times, shift, direction, guidance, latents' scale, pixels: all as in WanPipeline."""
    made = tiny_wan(processor, trained=True, guidance=guidance)
    latents, trail = made.sample(PROMPTS[0], 3, 4, noisy=set())
    embeds, empty = made.embeds[PROMPTS[0]], made.embeds[""]
    theirs = {"prompt_embeds": embeds, "negative_prompt_embeds": empty, "latents": made.draw(3), "height": 16,
              "width": 16, "num_frames": 9, "num_inference_steps": 4, "guidance_scale": guidance}
    made.pipe.set_progress_bar_config(disable=True)
    made.pipe.scheduler = ShiftedOnce(shift=3.0)
    wanted = made.pipe(**theirs, output_type="latent").frames
    assert torch.allclose(latents, wanted, atol=1e-4) and not trail
    told = theirs | {"prompt_embeds": None, "negative_prompt_embeds": None, "prompt": PROMPTS[0], "negative_prompt": ""}
    made.pipe.text_encoder = tiny_pipeline(processor).text_encoder
    assert torch.equal(made.pipe(**told, output_type="latent").frames, wanted)  # from words: as many text places
    video = torch.from_numpy(made.pipe(**theirs, output_type="np").frames[0])
    assert torch.allclose(made.decode(latents), video, atol=1e-4) and video.shape == (9, 16, 16, 3)


def test_a_clip_s_latents_are_scaled_as_wan_s(processor, tiny_clips):
    made = tiny_wan(processor, frames=5, width=64)  # not as high as wide
    seconds = [k / 16 for k in range(5)]  # at Wan's rate, whatever the file's is: this one has 4 frames a second
    latents, config = made.encode(tiny_clips[0]), made.pipe.vae.config
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    frames = open_clip(tiny_clips[0]).frames(seconds, (16, 64))[0]
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 255 * 2 - 1
    assert torch.allclose(latents * std + mean, made.pipe.vae.encode(pixels).latent_dist.mode(), atol=1e-4)


@pytest.mark.parametrize("noise, steps", [("flow-grpo", 4), ("longcat", 1)])
def test_a_replayed_clip_has_ratio_one_and_the_gradient_goes_its_way(processor, noise, steps):
    made = tiny_wan(processor, trained=True, noise=noise, clip=1.0, guidance=2.0)
    clips = [made.sample(PROMPTS[0], 3, seed, set(range(steps))) for seed in (4, 5)]
    assert not torch.equal(clips[0][0], clips[1][0]) and all(len(trail) == steps for _, trail in clips)

    def log_probs():
        """(2,): of all steps of each clip, as they would be made now."""
        with torch.no_grad():
            losses_ = [[made.grpo_step_loss(PROMPTS[0], step, torch.tensor([-1.0]), 1)["loss"] for step in trail]
                       for _, trail in clips]
        return torch.tensor(losses_).sum(dim=1)  # −A ρ w with A = −1: Σ ρ w

    step = clips[0][1][0]
    v = made.velocity(step.x, step.t, PROMPTS[0], 2.0)
    again = wan.flow.step_log_prob(step.x_next, wan.flow.sde_mean(step.x, v, step.t, step.t_next, step.sigma),
                                   step.sigma, step.t, step.t_next)
    assert (losses.policy_ratio(again, step.log_prob, torch.ones(1)) == 1).all()  # exactly
    before, optimizer = log_probs(), torch.optim.SGD(made.trained, lr=1.0)
    for advantage, (_, trail) in zip((1.0, -1.0), clips):
        for step in trail:
            made.grpo_step_loss(PROMPTS[0], step, torch.tensor([advantage]), 2 * steps)["loss"].backward()
    torch.nn.utils.clip_grad_norm_(made.trained, 0.01)
    optimizer.step()
    after = log_probs()
    assert after[0] - after[1] > before[0] - before[1]  # towards the better clip, away from the worse


def test_in_bf16_a_replayed_clip_has_ratio_one_too(wan_dir):
    """As on a GPU: Wan in bf16, its LoRA and the VAE in fp32."""
    made = wan.Wan(wan.open_pipeline(wan_dir, torch.bfloat16), PROMPTS, wan.Settings(**SMALL))
    for parameter in made.trained:
        torch.nn.init.normal_(parameter, std=0.3)
    latents, trail = made.sample(PROMPTS[0], 3, 4, {0, 1, 2})
    numbers = [made.grpo_step_loss(PROMPTS[0], step, torch.tensor([1.0]), 3) for step in trail]
    assert made.dtype == torch.bfloat16 and [number["ratio_off"].item() for number in numbers] == [0.0] * 3
    sum(number["loss"] for number in numbers).backward()
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in made.trained)
    assert any(p.grad.any() for p in made.trained) and made.decode(latents).isfinite().all()


def test_which_steps_are_noisy(processor):
    assert tiny_wan(processor, noise="flow-grpo").noisy_steps(5) == {0, 1, 2}  # not the last of 4
    early = [tiny_wan(processor, noise="longcat").noisy_steps(number) for number in range(12)]
    assert {len(steps) for steps in early} == {1} and set.union(*early) == {0, 1}


def test_kl_is_zero_at_the_start_and_pulls_back_later(processor):
    made = tiny_wan(processor, kl=1.0, noise="longcat")
    (step,) = made.sample(PROMPTS[0], 3, 4, {1})[1]
    nothing = torch.zeros(1)
    assert made.grpo_step_loss(PROMPTS[0], step, nothing, 1)["loss"].item() == 0.0  # v_ref is v
    for parameter in made.trained:
        torch.nn.init.normal_(parameter, std=0.3)
    loss = made.grpo_step_loss(PROMPTS[0], step, nothing, 1)["loss"]
    assert loss.item() > 0
    loss.backward()
    torch.optim.SGD(made.trained, lr=1e-3).step()
    assert made.grpo_step_loss(PROMPTS[0], step, nothing, 1)["loss"] < loss


@pytest.mark.parametrize("noise", ["longcat", "flow-grpo"])
def test_the_weight_of_the_kl_is_the_square_of_the_step_s(processor, noise):
    """flow.py (5): the gradient of log p shrinks with √(Δ (1 − t) / t), the KL with its square."""
    made = tiny_wan(processor, trained=True, kl=0.5, noise=noise)
    (step,) = made.sample(PROMPTS[0], 3, 4, {1})[1]
    with made.reference():
        v_ref = made.velocity(step.x, step.t, PROMPTS[0], 5.0)
    means = [wan.flow.sde_mean(step.x, v, step.t, step.t_next, step.sigma)
             for v in (made.velocity(step.x, step.t, PROMPTS[0], 5.0), v_ref)]
    kl = (means[0] - means[1]).square().mean() / (2 * step.sigma**2 * (step.t - step.t_next))
    square = step.t / ((step.t - step.t_next) * (1 - step.t)) if noise == "longcat" else 1.0
    loss = made.grpo_step_loss(PROMPTS[0], step, torch.zeros(1), 4)["loss"].item()
    assert loss == pytest.approx((0.5 * square * kl / 4).item(), rel=1e-4) and loss > 0


def test_flow_dpo_draws_its_times_as_the_sampler_s_are_shifted(processor):
    """u uniform: its median .5 becomes .75 at shift 3, its quarter .5."""
    made, times = tiny_wan(processor), []

    def velocity(x, t, prompt, guidance=1.0):
        times.append(t)
        return torch.zeros_like(x)

    made.velocity = velocity
    for seed in range(300):
        made.dpo_pair_loss(PROMPTS[0], made.draw(1), made.draw(2), seed)
        assert len({*times[-4:]}) == 1  # one t for both clips and their references
    quarter, half = (torch.tensor(times).quantile(q).item() for q in (0.25, 0.5))
    assert quarter == pytest.approx(0.5, abs=0.06) and half == pytest.approx(0.75, abs=0.06)


@pytest.mark.parametrize("label", [1, -1])
def test_flow_dpo_trains_towards_the_better_clip(processor, label):
    """The winner is B where the label is -1. After some steps the policy is nearer to it than to the other."""
    made, names = tiny_wan(processor, beta=100.0), ("a.mp4", "b.mp4")
    clips = {name: made.draw(seed) for seed, name in enumerate(names)}
    made.encode = clips.__getitem__
    pair = data.PreferencePair(*names, PROMPTS[0], label)
    optimizer, noise, t = torch.optim.AdamW(made.trained, lr=1e-2), made.draw(9), 0.6

    def lead():
        """How much better the policy has become at A than at B, against the reference."""
        errors = []
        for clip in clips.values():
            x = wan.flow.noised(clip, noise, t)
            with torch.no_grad():
                error = wan.flow.flow_error(made.velocity(x, t, PROMPTS[0]), clip, noise)
            with made.reference():
                errors.append(wan.flow.flow_error(made.velocity(x, t, PROMPTS[0]), clip, noise) - error)
        return (errors[0] - errors[1]).item()

    for number in range(8):
        wan.dpo_update(made, [(number, pair)], optimizer, made.s, parallel.start(0))
    assert lead() * label > 1e-3, lead()


@pytest.mark.parametrize("noise", ["flow-grpo", "longcat"])
def test_every_clip_and_step_has_noise_of_its_own(processor, noise):
    """Over two prompts of two clips. Start noise: one a clip, or with LongCat one a prompt."""
    made, starts, drawn = tiny_wan(processor, noise=noise, guidance=1.0), [], []
    sample = made.sample

    def watched(prompt, start_seed, seed, noisy):
        latents, trail = sample(prompt, start_seed, seed, noisy)
        starts.append(made.draw(start_seed))
        for step in trail:
            mean = wan.flow.sde_mean(step.x, made.velocity(step.x, step.t, prompt), step.t, step.t_next, step.sigma)
            drawn.append((step.x_next - mean) / (step.sigma * (step.t - step.t_next) ** 0.5))
        return latents, trail

    made.sample, optimizer = watched, torch.optim.SGD(made.trained, lr=0.0)
    wan.grpo_update(made, list(enumerate(PROMPTS)), lambda clips, _: torch.tensor([0.0, 1.0]), optimizer, made.s,
                    parallel.start(0))

    def alike(noises):
        """(N, N): which of them are the same, by correlation."""
        return torch.corrcoef(torch.stack(noises).flatten(1)) > 0.9

    assert len(drawn) == 4 * (3 if noise == "flow-grpo" else 1)
    assert torch.equal(alike(drawn), torch.eye(len(drawn), dtype=torch.bool))
    wanted = torch.eye(4) if noise == "flow-grpo" else torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
    assert torch.equal(alike(starts), wanted.bool())


def test_flow_dpo_starts_at_ln_2_falls_and_leaves_the_reference(processor):
    made = tiny_wan(processor, beta=100.0)
    chosen, rejected = made.draw(1), made.draw(2)
    with made.reference():
        before = made.velocity(chosen, 0.5, PROMPTS[0])
    optimizer, curve = torch.optim.AdamW(made.trained, lr=1e-2), []
    for _ in range(6):
        loss = made.dpo_pair_loss(PROMPTS[0], chosen, rejected, seed=7)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert curve[0] == pytest.approx(0.693147, abs=1e-5) and curve[-1] < curve[0] - 1e-3, curve
    with made.reference():
        assert torch.equal(made.velocity(chosen, 0.5, PROMPTS[0]), before)
    assert not torch.equal(made.velocity(chosen, 0.5, PROMPTS[0]), before)


@pytest.mark.parametrize("noise", ["flow-grpo", "longcat"])
def test_clips_go_where_the_reward_says(processor, noise):
    """The same updates with a reward and with its negative. Clips here are latents: a random VAE shows little."""
    ends, ranks = [], parallel.start(0)
    for sign in (1, -1):
        made = tiny_wan(processor, trained=True, guidance=1.0, group=8, noise=noise, clip=1.0, steps=3)
        made.decode = lambda latents: latents[0]
        optimizer = torch.optim.AdamW(made.trained, lr=2e-2)

        def score(clips, prompts, sign=sign):
            return sign * torch.stack([clip.mean() for clip in clips])

        for number in range(4):
            wan.grpo_update(made, [(number, PROMPTS[0])], score, optimizer, made.s, ranks)
        clips = [made.sample(PROMPTS[0], 100 + k, 0, noisy=set())[0] for k in range(8)]
        ends.append(torch.stack(clips).mean().item())
    assert ends[0] - ends[1] > 0.03, ends


def test_the_log_tells_what_the_clip_range_and_the_kl_do(processor):
    """Nothing in the first pass; in the second the ratio has moved, the way that the advantages say."""
    def update(**flags):
        made = tiny_wan(processor, guidance=1.0, clip=1e-9, **flags)
        return wan.grpo_update(made, [(0, PROMPTS[0])], lambda clips, _: torch.tensor([0.0, 1.0]),
                               torch.optim.AdamW(made.trained, lr=1e-2), made.s, parallel.start(0))

    once, twice = update(), update(passes=2, kl=0.1)
    assert once["clipped"] == once["ratio_off"] == 0 and "kl" not in once
    assert twice["clipped"] == pytest.approx(0.5) and twice["ratio_off"] > 0 and twice["kl"] > 0  # of both passes


def test_the_log_tells_how_far_the_winner_s_own_error_rose(processor, monkeypatch):
    """Both get worse, the loser more: the pair is right, and the loss below ln 2, -log σ(50 (.8 - .3))."""
    made, errors = tiny_wan(processor, beta=100.0), iter([1.0, 1.3, 1.0, 1.8])  # reference and policy, of winner, loser
    monkeypatch.setattr(wan.flow, "flow_error", lambda *args: torch.tensor([next(errors)]))
    numbers = made.dpo_pair_loss(PROMPTS[0], made.draw(1), made.draw(2), 3)
    found = {name: value.item() for name, value in numbers.items()}
    assert found == pytest.approx({"loss": 0.0, "pair_accuracy": 1.0, "winner_error_rise": 0.3}, abs=1e-6)


def test_a_reward_that_is_no_number_stops_the_run(processor):
    made, ranks, broken = tiny_wan(processor), parallel.start(0), torch.tensor([1.0, torch.nan])
    with pytest.raises(data.InputError, match="not finite"):
        wan.grpo_update(made, [(0, PROMPTS[0])], lambda clips, prompts: broken, None, made.s, ranks)


def test_a_gradient_that_is_no_number_is_one_sentence_and_no_step(processor):
    made = tiny_wan(processor)
    before = [parameter.detach().clone() for parameter in made.trained]
    for parameter in made.trained:
        parameter.grad = torch.full_like(parameter, torch.inf)
    with pytest.raises(InputError, match="norm is (nan|inf), so no step is taken"):
        wan.take_step(made, torch.optim.SGD(made.trained, lr=1.0), parallel.start(0))
    assert all(torch.equal(a, b) for a, b in zip(before, made.trained))


def flags(wan_dir, out, **more):
    """The command line of a run of one update."""
    values = {"wan": wan_dir, "out": out, **SMALL, "updates": 1, **more}
    words = [word for name, value in values.items() for word in ("--" + name.replace("_", "-"), str(value))]
    return [*words, "--no-think"]


def test_the_script_and_two_ranks_give_the_same_lora(processor, wan_dir, tiny_model_dir, tmp_path, monkeypatch):
    """Prompts' clips and noise follow from their numbers, gradients are summed: ranks change only who does what."""
    rates, reward = [], wan.DeScore.reward

    def watched(*args, **more):
        rates.append(more["source_fps"])
        return reward(*args, **more)

    monkeypatch.setattr(wan.DeScore, "reward", watched)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    loras = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        args = flags(wan_dir, out, method="grpo", reward=tiny_model_dir, data=tmp_path / "prompts.txt", noise="longcat")
        run("-m", "lab.post_training.wan", *args, ranks=ranks) if ranks > 1 else wan.main(args)
        fresh = tiny_pipeline(processor)
        fresh.load_lora_weights(str(out))  # the way a user opens it
        trained = fresh.transformer.peft_config["default_0"]
        assert trained.lora_alpha == 2 * trained.r  # or it would work at half the strength that was trained
        loras.append({name: p for name, p in fresh.transformer.named_parameters() if ".lora_" in name})
        (line,) = (json.loads(line) for line in open(out / "metrics.jsonl"))
        assert set(line) == {"step", "reward", "group_std", "loss", "clipped", "ratio_off", "grad_norm"}
        assert line["grad_norm"] > 0
    assert {*rates} == {16.0}  # frames per second of Wan's clips: by it the reward model is told each frame's time
    assert loras[0].keys() == loras[1].keys() and loras[0]
    assert any(p.abs().max() > 0 for name, p in loras[0].items() if "lora_B" in name)  # B starts at 0
    for name, p in loras[0].items():
        assert torch.allclose(p, loras[1][name], atol=1e-5), name


def test_dpo_script(wan_dir, world, tmp_path):
    pairs = world["train_rl"]
    wan.main(flags(wan_dir, tmp_path / "out", method="dpo", data=pairs, frames=5))
    (line,) = (json.loads(line) for line in open(tmp_path / "out" / "metrics.jsonl"))
    assert line["loss"] == pytest.approx(0.693147, abs=1e-4) and line["grad_norm"] > 0
    assert set(line) == {"step", "loss", "pair_accuracy", "winner_error_rise", "grad_norm"}


def test_clips_that_do_not_fit_are_refused_before_wan_is_opened(capsys, tiny_clips, tmp_path, monkeypatch):
    """With the line of the first. Lines that the updates do not come to are not looked at."""
    def opened(*args):
        raise InputError("all clips fit.")

    monkeypatch.setattr(wan, "open_pipeline", opened)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    good, bad, none = tiny_clips[0], str(tmp_path / "bad.mp4"), str(tmp_path / "none.mp4")
    rows = [[good, tiny_clips[1], "a", "A"], [good, none, "tie", "same"], [bad, good, "b", "B"], [good, none, "c", "A"]]
    pairs = write_csv(tmp_path / "pairs.csv", ["path_A", "path_B", "prompt", "TA"], rows)

    def dpo(**more):
        return flags("-", tmp_path / "out", **{"method": "dpo", "data": pairs, "frames": 5, "batch": 1, **more})

    refuses(capsys, wan.main, *dpo(batch=3), says=f"pairs.csv, line 4 (the first of 2 clips): {bad}: is broken")
    refuses(capsys, wan.main, *dpo(frames=401), says=f"line 2 (the first of 2 clips): {good}: lasts ")
    refuses(capsys, wan.main, *dpo(width=32), says="would be squashed; give --width and --height (now 32, 16)")
    refuses(capsys, wan.main, *dpo(), says="all clips fit.")
    refuses(capsys, wan.main, *dpo(height=480, width=496), says="all clips fit.")  # off by 3 %


def test_a_clip_that_is_damaged_further_on_is_named_by_its_line(processor):
    made = tiny_wan(processor)
    made.s.data, made.encode = "pairs.csv", lambda path: open_clip("nowhere.mp4")
    pair = data.PreferencePair("a.mp4", "b.mp4", PROMPTS[0], 1, line=7)
    with pytest.raises(InputError, match="pairs.csv, line 7: nowhere.mp4"):
        wan.dpo_update(made, [(0, pair)], None, made.s, parallel.start(0))


def test_only_the_prompts_that_the_updates_come_to_are_read(tmp_path):
    """Each is an embedding of 4 MB."""
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    found = [wan.read_items(wan.Settings(method="grpo", data=str(tmp_path / "prompts.txt"), updates=n, batch=2))
             for n in (1, 9)]
    assert found == [["a", "b"], ["a", "b", "c"]]


def test_a_run_that_was_stopped_goes_on_to_the_bit(capsys, wan_dir, tiny_model_dir, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")

    def train(out, updates, **more):
        return flags(wan_dir, tmp_path / out, method="grpo", data=tmp_path / "prompts.txt",
                     **{"reward": tiny_model_dir, "lr": 1e-2, "save_every": 2, "updates": updates, **more})

    wan.main(train("whole", 3))
    wan.main(train("parts", 2))
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "reward": 9}\n{"step": 4, "rew')  # it was killed during update 4
    wan.main(train("parts", 3))
    lines = [(tmp_path / out / "metrics.jsonl").read_text() for out in ("whole", "parts")]
    assert lines[0] == lines[1] and lines[0].count("\n") == 3
    loras = [torch.load(tmp_path / out / "state.pt")["trained"] for out in ("whole", "parts")]
    assert all(torch.equal(a, b) for a, b in zip(*loras)) and any(p.abs().max() > 0 for p in loras[0])
    wan.main(train("parts", 3))  # done: nothing changes
    assert (tmp_path / "parts" / "metrics.jsonl").read_text() == lines[0]
    refuses(capsys, wan.main, *train("parts", 4, lr=2e-2), says="other --lr")
    moved = shutil.copytree(tiny_model_dir, tmp_path / "moved")
    wan.main(train("parts", 3, reward=moved))  # the same one at another place
    with open(moved / "descore.json", "a") as file:
        file.write("\n")
    refuses(capsys, wan.main, *train("parts", 4, reward=moved), says="other content of --reward;")
    state = torch.load(tmp_path / "parts" / "state.pt")
    torch.save(state | {"made_from": {"base": "the toy's"}}, tmp_path / "parts" / "state.pt")
    refuses(capsys, wan.main, *train("parts", 4), says="other content of --data, content of --reward;")
    torch.save(state, tmp_path / "parts" / "state.pt")
    (tmp_path / "prompts.txt").write_text("other words\n")
    refuses(capsys, wan.main, *train("parts", 4), says="other content of --data;")
    state = torch.load(tmp_path / "parts" / "state.pt")
    torch.save({name: state[name] for name in state if name != "made_from"}, tmp_path / "parts" / "state.pt")
    wan.main(train("parts", 3, reward=moved))  # begun by code that did not keep it


def test_the_log_of_another_kind_of_run_is_not_emptied(capsys, tiny_model_dir, tmp_path, monkeypatch):
    def opened(*args):
        raise InputError("goes on.")

    monkeypatch.setattr(wan, "open_pipeline", opened)
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    args = flags("-", tmp_path, method="grpo", reward=tiny_model_dir, data=tmp_path / "prompts.txt")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seconds": 2.5, "loss": 0.69, "grad_norm_llm": 1.0}\n')
    refuses(capsys, wan.main, *args, says="the metrics.jsonl in it is another kind of run's")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.69, "grad_norm": 1.0}\n')
    refuses(capsys, wan.main, *args, says="goes on.")  # ours, killed before it was saved


def test_no_more_than_the_update_under_way_is_lost(capsys, wan_dir, tiny_model_dir, tmp_path, monkeypatch):
    """By default: 20 updates between savings would be hours."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    rewards = iter([[0.0, 1.0], [1.0, 0.0], [1.0, torch.nan]])  # the third group is the second update's
    monkeypatch.setattr(wan.DeScore, "reward", lambda *args, **more: torch.tensor(next(rewards)))
    args = flags(wan_dir, tmp_path / "out", method="grpo", reward=tiny_model_dir, data=tmp_path / "prompts.txt",
                 updates=9)
    refuses(capsys, wan.main, *args, says="not finite")
    assert torch.load(tmp_path / "out" / "state.pt")["done"] == 1


def test_bad_flags(capsys, wan_dir, tmp_path):
    (tmp_path / "empty.txt").write_text("\ufeff\n", encoding="utf-8")  # a byte order mark is no prompt
    grpo = ["--method", "grpo", "--reward", "-", "--out", tmp_path / "o", "--data", tmp_path / "empty.txt"]
    refuses(capsys, wan.main, says="--method is missing")
    refuses(capsys, wan.main, "--method", "grpo", "--data", "x", "--out", "y", says="--reward is missing")
    refuses(capsys, wan.main, *grpo, "--frames", "80", says="--frames must be 4 n + 1")
    refuses(capsys, wan.main, *grpo, says="holds nothing")
    refuses(capsys, wan.main, *grpo[:-1], "nowhere.txt", says="nowhere.txt")
    refuses(capsys, wan.main, *grpo[:-1], "pairs.csv", says="is a CSV")  # whose header would be a prompt


@pytest.mark.parametrize("change", [
    lambda pipe: pipe.register_to_config(boundary_ratio=0.875),
    lambda pipe: pipe.register_to_config(expand_timesteps=True),
    lambda pipe: pipe.register_modules(transformer_2=pipe.transformer),
    lambda pipe: pipe.register_modules(transformer=tiny_transformer(in_channels=36)),
], ids=["boundary", "times", "experts", "image"])
def test_other_wans_are_refused(processor, tmp_path, change):
    """Wan2.2's have two experts (A14B) or a time for each patch (5B), image-to-video ones the image's channels."""
    pipe = tiny_pipeline(processor)
    change(pipe)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is not Wan2.1's text-to-video model"):
        wan.open_pipeline(str(tmp_path), torch.float32)


@pytest.mark.parametrize("package", ["diffusers", "ftfy"])
def test_a_package_that_is_missing_is_one_sentence(monkeypatch, package):
    """Without ftfy diffusers would read prompts as other tokens than Wan was trained on."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match="needs diffusers, ftfy: pip install -r requirements-wan.txt"):
        wan.open_pipeline("anywhere", torch.float32)
