"""Pillow with NumPy: crops resampled, and made patches of as a vision tower takes them."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
from PIL import Image

versions = {"Pillow": PIL.__version__, "NumPy": np.__version__}
pool = None


def begin(threads, device):
    # Pillow lets the interpreter go while it resamples, so crops run side by side.
    global pool
    pool = ThreadPoolExecutor(threads)


def array(data, dtype, shape):
    return np.frombuffer(data, {"u8": np.uint8}[dtype]).reshape(shape)


def timed(run, runs):
    start = time.perf_counter()
    for _ in range(runs):
        run()
    return (time.perf_counter() - start) * 1e3 / runs


def numbers(result):
    return np.concatenate([np.asarray(part, np.float32).ravel() for part in result]).tobytes()


def closed():
    pass


def resample(arrays, options):
    image = Image.fromarray(arrays["image"])

    def one(cut):
        size = (cut["width"], cut["height"])
        return image.crop(cut["box"]).resize(size, Image.Resampling.BICUBIC)

    def run():
        return list(pool.map(one, options["cuts"]))

    return run, run


def patches(arrays, options):
    """(x / 255 - 0.5) / 0.5 in Qwen-VL's order: patches of 16, merged 2 x 2, each frame twice."""
    image = Image.fromarray(arrays["image"])

    def one(cut):
        height, width = cut["height"], cut["width"]
        part = image.crop(cut["box"]).resize((width, height), Image.Resampling.BICUBIC)
        x = np.asarray(part, np.float32)
        x = (x * np.float32(1 / 255) - np.float32(0.5)) * np.float32(2)
        x = x.reshape(height // 32, 2, 16, width // 32, 2, 16, 3)
        x = x.transpose(0, 3, 1, 4, 6, 2, 5)
        x = np.broadcast_to(x[:, :, :, :, :, None], (*x.shape[:5], 2, 16, 16))
        return np.ascontiguousarray(x)

    def run():
        return list(pool.map(one, options["cuts"]))

    return run, run
