"""Frames per second of the synthetic source on one core, 256x256, median over repeats.

OMP_NUM_THREADS=1 python benchmarks/synthetic_source.py --frames 200 --repeats 5
"""

import argparse
import statistics
import time

import cv2

from polypseg.data.synthetic import CAMERAS, CameraStyle, synthesize_frame


def frames_per_second(camera: CameraStyle, *, frames: int, side: int) -> float:
    """Speed of one pass over ``frames`` frames of ``side`` x ``side`` pixels."""
    start = time.perf_counter()
    for index in range(frames):
        synthesize_frame(camera, seed=0, index=index, size=(side, side))
    return frames / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description="Frames per second of the synthetic source on one core.")
    parser.add_argument("--frames", type=int, default=200, help="frames in one repeat")
    parser.add_argument("--repeats", type=int, default=5, help="repeats, of which the median counts")
    parser.add_argument("--side", type=int, default=256, help="height and width in pixels")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    for name, camera in CAMERAS.items():
        synthesize_frame(camera, seed=0, index=0, size=(args.side, args.side))  # fills the grid cache
        speeds = [frames_per_second(camera, frames=args.frames, side=args.side) for _ in range(args.repeats)]
        print(
            f"camera {name}: {statistics.median(speeds):.0f} frames/s at {args.side}x{args.side}, one thread "
            f"(median of {args.repeats}, {min(speeds):.0f} to {max(speeds):.0f})"
        )


if __name__ == "__main__":
    main()
