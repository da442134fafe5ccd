"""DeScore in place of DanceGRPO's VideoAlign (dance_grpo.md): a class with the same constructor and the same `reward`.

Read in github.com/hokindeng/DanceGRPO, a copy of XueZeyue/DanceGRPO, fastvideo/train_grpo_hunyuan.py at c7c70f9: each
clip is written to an mp4, `reward([path], [prompt], use_norm=True)` gives a list of dicts, and `VQ` and `MQ` of the
first are read as floats. There every `Exception` becomes a reward of -1.0, for a clip that may be good; so a failure
here is a SystemExit, which is none, and ends the run with a sentence.
"""

import math

from .over_http import rewards_of

NAMES = ("VQ", "MQ", "TA", "Overall")  # DeScore has one reward: it stands under each name that trainers read


class DeScoreInference:
    """load_from_pretrained: a DeScore folder, opened in this process, or the address of a server (lab/serve).

    think, max_new_tokens: for a folder; a server has its own flags.
    """

    def __init__(self, load_from_pretrained: str, device="cuda", dtype=None, think=True, max_new_tokens=4096):
        self.where, self.model = load_from_pretrained, None
        self.how = {"think": think, "max_new_tokens": max_new_tokens}
        if not load_from_pretrained.startswith("http"):
            from model import DeScore  # with this project's folder in PYTHONPATH, and its transformers

            self.model = DeScore.from_pretrained(load_from_pretrained, device, *(() if dtype is None else (dtype,)))

    def reward(self, video_paths: list[str], prompts: list[str], use_norm=True) -> list[dict[str, float]]:
        """A dict for each clip. use_norm: a scale changes nothing, since the trainer divides by the group's spread.

        No reward at all ends the run (SystemExit): the trainer would go on with -1.
        """
        try:
            if self.model is None:
                rewards = rewards_of([open(path, "rb").read() for path in video_paths], prompts, url=self.where)
            else:
                rewards = self.model.reward(video_paths, prompts, **self.how).tolist()
            if not all(map(math.isfinite, rewards)):
                raise ValueError(f"the rewards {rewards} are not finite")
        except Exception as error:  # any: the trainer makes -1.0 of each, and would train on it
            raise SystemExit(f"DeScore: no reward for {', '.join(map(str, video_paths))}: {error}") from error
        return [dict.fromkeys(NAMES, reward) for reward in rewards]
