"""Videos as frames with time stamps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from equigemma.images import Image


@dataclass(frozen=True, eq=False)
class Video:
    """Frames of a video, evenly spaced in time.

    Files are not decoded here: libraries such as `av` or `imageio` give frames as arrays.
    """

    frames: Sequence[Image]
    """Images, or one array `uint8[frames height width 3]`."""
    fps: float
    """Frames per second."""

    def __post_init__(self):
        if not len(self.frames):
            raise ValueError("A video needs at least one frame, got none.")
        if not 0 < self.fps < float("inf"):
            raise ValueError(f"Video.fps must be positive, got {self.fps}.")


def sample_frames(total: int, count: int) -> list[int]:
    """The numbers of `count` frames of `total`, evenly spaced; all of them if there are fewer.

    ```python
    >>> from equigemma.video import sample_frames
    >>> sample_frames(10, 4)
    [0, 2, 5, 7]

    ```

    **Arguments:**

    - `total`: frames of the video.
    - `count`: the most frames that are wanted.

    **Returns:** numbers of frames, counted from 0, in ascending order.

    **Source:** transformers `video_utils.py::default_sample_indices_fn`, which refuses videos that
    have fewer.
    """
    count = min(total, count)
    return [int(index) for index in np.arange(count) * total // count]


def timestamp(seconds: float) -> str:
    """Minutes and seconds, rounded down.

    ```python
    >>> from equigemma.video import timestamp
    >>> timestamp(83.9)
    '01:23'

    ```

    **Arguments:** `seconds`: from the beginning of the video.

    **Returns:** `"MM:SS"`; minutes may be more than 59.

    **Source:** transformers `models/gemma4/processing_gemma4.py::replace_video_token`.
    """
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"
