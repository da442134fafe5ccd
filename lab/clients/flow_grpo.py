"""DeScore as a scorer of flow_grpo (flow_grpo.md). Copy it, and over_http.py, beside flow_grpo's rewards.py.

The form of a scorer there: `name(device)` gives a function of (videos, prompts, metadata) that gives (scores, {}); read
in github.com/yifan123/flow_grpo, flow_grpo/rewards.py (`multi_score`) at 54809b5, and what the Wan script hands over in
scripts/train_wan2_1.py at 32b48fd: a tensor (N, F, 3, H, W) in [0, 1]. It runs in a thread; what it raises is raised
where the trainer waits for rewards, and ends the run.
"""

import io

from PIL import Image

from .over_http import rewards_of


def descore_score(device, fps=16.0):
    """fps: of the clips; Wan's is 16. device: not used, the server has its own.

    What it returns raises ValueError for videos of another shape or range.
    """

    def score(videos, prompts, metadata):
        if videos.ndim != 5 or videos.shape[2] != 3 or not (-1e-3 <= videos.min() <= videos.max() <= 1 + 1e-3):
            raise ValueError(f"videos of shape {tuple(videos.shape)}, from {videos.min():g} to {videos.max():g}: "
                             "(N, F, 3, H, W) in [0, 1] is needed")  # nan fails every comparison
        frames = (videos.float() * 255).round().clamp(0, 255).byte().permute(0, 1, 3, 4, 2).cpu().numpy()
        return rewards_of([[png(frame) for frame in video] for video in frames], prompts, fps=fps), {}

    return score


def png(frame) -> bytes:
    """(H, W, 3) uint8 -> a PNG file."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, format="PNG")
    return file.getvalue()
