"""The vLLM engine: one per process, in the process. Beside a trainer its weights are handed over after each update."""

import os
import re

import torch

from plumbing.adapters import SURVIVAL, survival_line
from plumbing.checkpoint import EMBEDDING, SETTINGS_FILE, read_config, trained_settings
from plumbing.settings import InputError, first_line

REQUESTS = 256  # CoTs asked for at once. More keep the GPU no busier, and their frames would fill the host's memory


class VLLMEngine:
    """One vLLM engine per process, in this process. docs/engines.md says how it is used.

    banned: ids that may not be sampled. limit: prompt + CoT tokens at most. memory: its share of the GPU.
    tp: ranks that hold one engine together.
    sleeps: give the GPU's memory back after every `generate`, for the update of a trainer beside it.
    """

    needs = ("short_ids", "input_ids", "video")  # of a prefix: the patches are made anew in vLLM

    def __init__(self, path: str, processor, banned: list[int], seed: int, limit: int, memory=0.4, dtype="auto",
                 on_cpu=False, tp=1, sleeps=True):
        # The engine in this process, so that weights can be handed over. To be set before the import.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            from vllm import LLM
        except ImportError as error:
            raise InputError("--engine vllm: vllm is not installed; pip install -r requirements-vllm.txt.") from error
        if not on_cpu:  # bf16, so without what rounding takes from the merged LoRA (docs/differences.md, row 25)
            say_merged(path)
        # The process group must be there BEFORE the engine starts, or it makes its own.
        distributed = torch.distributed.is_initialized()
        options = {"gpu_memory_utilization": memory}
        if on_cpu:
            options = {"kv_cache_memory_bytes": 64 << 20, "block_size": 32}
        # vLLM has a second limit, of the tokens of ONE video: the most that its processor would make of one, or a batch
        # if that is more. As large as the first, there is only one; the start measures what a video so long takes.
        vision = processor.video_processor
        longest = limit * vision.temporal_patch_size * (vision.merge_size * vision.patch_size) ** 2  # T x H x W
        state = torch.get_rng_state()  # the engine reseeds the global generators
        try:
            self.llm = LLM(
                model=path, dtype=dtype, max_model_len=limit, seed=seed, enforce_eager=on_cpu,
                mm_processor_kwargs={"do_resize": False, "cap_pixels_per_frame": False,  # as data.encode_prompt
                                     "size": {"longest_edge": longest}},  # read for that limit alone: no resizing
                tensor_parallel_size=tp, limit_mm_per_prompt={"image": 0, "video": 1}, enable_prefix_caching=True,
                logprobs_mode="processed_logprobs", enable_sleep_mode=not on_cpu,
                distributed_executor_backend="external_launcher" if distributed else None, **options,
            )
        except (ValueError, RuntimeError) as error:  # RuntimeError: a GPU's memory that is full, too
            raise InputError(f"--engine vllm: did not start ({first_line(error)}); lower --engine-max-len {limit}, "
                             f"change --engine-memory {memory}, or take --engine transformers.") from error
        torch.set_rng_state(state)
        self.under_way = {}  # key -> its CoTs, None for those that have not ended
        self.places = {}  # name of a request -> its key, number and prompt
        self.bans = dict.fromkeys(banned, -100.0)  # vLLM's lowest; at most 1,024 ids
        self.processor, self.limit, self.requests, self.sleeps = processor, limit, REQUESTS, sleeps
        self.on_cpu, self.asleep, self.tp = on_cpu, False, tp
        self.tied = read_config(path).tie_word_embeddings
        if tp > 1:
            from vllm.distributed import get_tp_group

            self.group = get_tp_group()

    def generate(self, prefixes, seeds, max_new_tokens, temperature=1.0) -> list[list[list[int]]]:
        """As TransformersEngine.generate, and self.log_probs of the same shape: each token's, as the engine saw it."""
        rows = dict(self.stream(prefixes, seeds, max_new_tokens, temperature))  # in the order in which they ended
        self.log_probs = [self.seen[i] for i in range(len(prefixes))]
        if self.sleeps:
            self.sleep(level=1)  # not 2: `sync` sends what is trained, and the frozen tower would be forgotten
        return [rows[i] for i in range(len(prefixes))]

    def stream(self, prefixes, seeds, max_new_tokens, temperature=1.0):
        """Yields (i, CoTs of prefix i) as soon as they have ended, in any order.

        With tensor parallelism this is COLLECTIVE within the group, whose ranks sample for each other: all do the work
        of all, in shards.
        """
        first, mine = 0, len(prefixes)
        if self.tp > 1:
            slim = [{key: prefix[key] for key in self.needs} for prefix in prefixes]
            parts = [None] * self.tp
            torch.distributed.all_gather_object(parts, (slim, seeds), group=self.group.cpu_group)
            first = sum(len(part[0]) for part in parts[: self.group.rank_in_group])
            prefixes, seeds = ([x for part in parts for x in part[k]] for k in (0, 1))
        self.wake()
        self.seen = {}
        try:
            for i, (prefix, row) in enumerate(zip(prefixes, seeds, strict=True)):
                self.add(i, prefix, row, max_new_tokens, temperature)
            while self.under_way:
                for i, cots, log_probs in self.step():
                    if first <= i < first + mine:
                        self.seen[i - first] = log_probs
                        yield i - first, cots
        finally:  # an error, or a caller that needs no more: nothing is left for the next call
            for i in list(self.under_way):
                self.cancel(i)

    def add(self, key, prefix: dict, seeds: list[int], max_new_tokens: int, temperature=1.0) -> None:
        """len(seeds) CoTs of one prefix join the running batch at the next `step`.

        One request per CoT: each has its own seed, and prefix caching shares the video. key: any name for them, told
        again when they end. InputError: no room for them, or a video that vLLM refuses; the others go on.
        """
        from vllm import SamplingParams

        require_room(len(prefix["input_ids"]), max_new_tokens, self.limit)
        self.wake()
        metadata = {**prefix["video"].metadata(), "do_sample_frames": False}  # our frames: never resampled
        video_data = {"video": [(prefix["video"].frames, metadata)]}
        prompt = {"prompt_token_ids": prefix["short_ids"], "multi_modal_data": video_data}
        self.under_way[key] = [None] * len(seeds)
        try:
            for k, seed in enumerate(seeds):
                options = SamplingParams(temperature=temperature, top_p=1.0, top_k=0, max_tokens=max_new_tokens,
                                         seed=seed % 2**31, logit_bias=self.bans, logprobs=0, detokenize=False)
                (name,) = self.llm.enqueue([prompt], [options], use_tqdm=False)
                name = name.split("-")[0]  # inside, vLLM adds a "-" and random letters; outputs come without
                self.places[name] = key, k, prefix["input_ids"]
        except Exception as error:
            self.cancel(key)
            if isinstance(error, (ValueError, client_error())):
                raise InputError(f"vLLM refused the video ({first_line(error)}).") from error
            raise

    def step(self) -> list[tuple]:
        """One more token for each CoT under way. Returns (key, CoTs, log-probs) of the prefixes whose CoTs have ended.

        What it raises ends the engine: nothing tells in which state that left it. InputError: vLLM read the video as
        other tokens than the trainer.
        """
        ended = []
        for output in self.llm.llm_engine.step():
            if not output.finished or output.request_id not in self.places:
                continue
            key, k, input_ids = self.places.pop(output.request_id)
            if list(output.prompt_token_ids) != input_ids.tolist():
                raise InputError("vLLM expanded the video to other tokens than the trainer; check both versions.")
            self.under_way[key][k] = output.outputs[0]
            if None not in self.under_way[key]:
                samples = self.under_way.pop(key)
                log_probs = [[next(iter(token.values())).logprob for token in sample.logprobs] for sample in samples]
                ended.append((key, [list(sample.token_ids) for sample in samples], log_probs))
        return ended

    def cancel(self, key) -> None:
        """The CoTs of `key` leave the batch: nobody waits for them any more."""
        names = [name for name, place in self.places.items() if place[0] == key]
        for name in names:
            del self.places[name]
        self.llm.llm_engine.abort_request(names)
        del self.under_way[key]

    def wake(self) -> None:
        """Takes the GPU's memory again, if it was given back."""
        if self.asleep:
            torch.cuda.empty_cache()  # PyTorch keeps what the update has freed; vLLM needs it now
            self.llm.wake_up()
            self.asleep = False

    def sleep(self, level: int) -> None:
        """Gives the GPU's memory back. Level 1 keeps the weights in the host's memory, 2 forgets them: then nothing
        can be sampled any more. vLLM's CPU build cannot sleep."""
        if not self.on_cpu:
            self.llm.sleep(level=level)
            self.asleep = True

    def sync(self, named_weights) -> None:
        """Hands new weights to the engine and empties its caches, which hold what the old weights computed.

        Raises InputError unless every weight has arrived: vLLM itself only warns.
        """
        self.wake()
        self.llm.collective_rpc(_reload, args=(named_weights, self.tied))
        assert self.llm.reset_prefix_cache(), "vLLM could not reset its prefix cache: requests still running"
        self.llm.llm_engine.reset_encoder_cache()  # without it a repeated video kills the engine

    def close(self) -> None:
        """Ends the engine. It takes the process group with it, so this is the very last thing a script does."""
        self.llm.llm_engine.engine_core.shutdown()


def client_error() -> type:
    """What vLLM raises for a request that it does not take: an error of its own; in older releases a ValueError."""
    try:
        from vllm.exceptions import VLLMClientError
    except ImportError:
        return ValueError
    return VLLMClientError


def say_merged(path: str) -> None:
    """Prints what a program that opens the folder as a plain model in bf16 has of its LoRA, if there is any."""
    if os.path.isfile(os.path.join(path, SETTINGS_FILE)) and (cosines := trained_settings(path).get(SURVIVAL)):
        print(survival_line(cosines), flush=True)


def require_room(prompt_tokens: int, max_new_tokens: int, limit: int) -> None:
    """InputError if a CoT of full length has no room behind its prompt: vLLM would cut it without a word."""
    if prompt_tokens + max_new_tokens > limit:
        raise InputError(f"{prompt_tokens} prompt tokens and a CoT of up to {max_new_tokens} exceed the engine's "
                         f"{limit}; raise --engine-max-len, or lower --max-new-tokens, --fps or --max-pixels.")


def _reload(worker, named_weights, tied: bool) -> None:
    """Runs in vLLM's worker, which is this process: loads the weights and checks that each has arrived.

    tied: the trainer has one matrix for word embedding and lm_head, and sends it once, as the embedding. vLLM reloads
    layer by layer and may keep a packed copy for lm_head (its CPU build does): unless it gets that by name as well,
    it reads words with the new weights and chooses them with the old ones.
    """
    model, sent, arrived = worker.model_runner.get_model(), [], set()
    load = model.load_weights

    def noting():
        """The weights as they come, their names noted: all must arrive."""
        for name, value in named_weights:
            sent.append(name)
            yield name, value
            if tied and name == EMBEDDING:
                sent.append("lm_head.weight")
                yield "lm_head.weight", value

    def load_and_note(weights):
        arrived.update(load(weights))
        return arrived

    model.load_weights = load_and_note
    try:
        worker.model_runner.reload_weights(weights_iterator=noting())
    finally:
        del model.load_weights  # the class's own again
    wanted = model.hf_to_vllm_mapper.apply_list(sent)
    for packed, parts in model.packed_modules_mapping.items():  # vLLM holds q, k and v in one matrix, gate and up too
        wanted = [re.sub(rf"\.({'|'.join(parts)})\.", f".{packed}.", name) for name in wanted]
    if missing := sorted(set(wanted) - arrived):
        raise InputError(f"vLLM did not take {len(missing)} trained weights, e.g. {missing[0]}; check its version.")
