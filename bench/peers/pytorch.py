"""PyTorch, on the CPU or a CUDA device: attention, log-probabilities, a linear head, resampling."""

import ctypes
import time

import torch
import torch.nn.functional as F

from serve import Absent

versions = {"PyTorch": torch.__version__}
where = torch.device("cpu")
types = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i32": torch.int32,
    "u8": torch.uint8,
}


def begin(threads, device):
    global where
    where = torch.device(device)
    torch.set_num_threads(threads)
    if where.type == "cuda":
        if not torch.cuda.is_available():
            raise Absent("PyTorch sees no CUDA device")
        versions["cuDNN"] = str(torch.backends.cudnn.version())
        # What is called f32 here is f32, as in the rows beside it.
        torch.backends.cuda.matmul.allow_tf32 = False


def array(data, dtype, shape):
    block = torch.frombuffer(data, dtype=types[dtype]).to(where)
    size = torch.Size(shape).numel()
    if len(block) < size:
        block = block.repeat(-(-size // len(block)))[:size]
    return block.reshape(shape)


def timed(run, runs):
    if where.type == "cpu":
        start = time.perf_counter()
        for _ in range(runs):
            run()
        return (time.perf_counter() - start) * 1e3 / runs
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(runs):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / runs


def numbers(result):
    host = result.detach().float().cpu().contiguous()
    return ctypes.string_at(host.data_ptr(), 4 * host.numel())


def closed():
    """After a workload: what the next one, or the library beside this process, may need."""
    if where.type == "cuda":
        torch.cuda.empty_cache()


# ---- Attention: [T, H, D] of sequences of one length ----


def sdpa(arrays, options):
    """softmax(q kT / sqrt(D)) v by the backend that is named, or whichever PyTorch takes."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    named = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    backends = [named[options["backend"]]] if options["backend"] else list(SDPBackend.__members__.values())
    sequences = options["sequences"]

    def split(x):
        return x.unflatten(0, (sequences, -1)).transpose(1, 2)

    def joined(x):
        return x.transpose(1, 2).flatten(0, 1)

    leaves = [arrays[name] for name in "qkv"]
    q, k, v = (split(x) for x in leaves)

    def forward():
        with sdpa_kernel(backends):
            return F.scaled_dot_product_attention(q, k, v)

    if options["pass"] == "fwd":
        return forward, lambda: joined(forward())[-options["last"] :]
    for x in (q, k, v):
        x.requires_grad_()
    d_out = split(arrays["dOut"])
    kept = forward() if options["pass"] == "bwd" else None

    def backward():
        torch.use_deterministic_algorithms(options["deterministic"])
        try:
            out = forward() if kept is None else kept
            return torch.autograd.grad(out, (q, k, v), d_out, retain_graph=kept is not None)
        finally:
            torch.use_deterministic_algorithms(False)

    return backward, lambda: joined(backward()[1])[-options["last"] :]


# ---- Log-probabilities of logits [N, V] ----


def log_softmax_gather(arrays, options):
    logits, targets = arrays["logits"], arrays["targets"].long()[:, None]

    def run():
        return torch.log_softmax(logits.float(), -1).gather(1, targets)[:, 0]

    return run, run


def cross_entropy(arrays, options):
    """The gradient of the sum of the log-probabilities."""
    logits, targets = arrays["logits"].requires_grad_(), arrays["targets"].long()

    def run():
        loss = F.cross_entropy(logits, targets, reduction="sum")
        return torch.autograd.grad(loss, logits)[0]

    return run, lambda: -run()[-options["last"] :]


# ---- A linear head: hidden [N, C], weight [V, C] ----


def linear_log_probs(arrays, options):
    hidden, weight, targets = arrays["hidden"], arrays["weight"], arrays["targets"].long()

    def run():
        out = []
        for h, t in zip(hidden.split(options["chunk"]), targets.split(options["chunk"])):
            logits = (h @ weight.T).float()
            out.append(logits.gather(1, t[:, None])[:, 0] - logits.logsumexp(-1))
        return torch.cat(out)

    return run, run


def linear_policy_loss(arrays, options):
    """On-policy PPO with token-mean through the head: the gradient of hidden and weight."""
    hidden, weight = arrays["hidden"].requires_grad_(), arrays["weight"].requires_grad_()
    targets, advantages = arrays["targets"].long()[:, None], arrays["advantages"]

    def run():
        logits = F.linear(hidden, weight).float()
        log_probs = torch.log_softmax(logits, -1).gather(1, targets)[:, 0]
        loss = -(advantages * (log_probs - log_probs.detach()).exp()).mean()
        return torch.autograd.grad(loss, (hidden, weight))

    return run, lambda: run()[0]


# ---- Images [H, W, 3] ----


def resized(arrays, options):
    """torchvision's antialiased bicubic resampling, and (x / 255 - 0.5) / 0.5 in Qwen-VL's patches."""
    from torchvision.transforms.functional import InterpolationMode, resize

    image = arrays["image"].permute(2, 0, 1)
    dtype = types[options["dtype"]]

    def one(cut):
        x0, y0, x1, y1 = cut["box"]
        height, width = cut["height"], cut["width"]
        part = image[:, y0:y1, x0:x1]
        x = resize(part, [height, width], InterpolationMode.BICUBIC, antialias=True)
        if not options["patches"]:
            return x.permute(1, 2, 0).contiguous()
        x = (x.to(torch.float32) * (1 / 127.5) - 1).to(dtype)
        x = x.reshape(3, height // 32, 2, 16, width // 32, 2, 16).permute(1, 4, 2, 5, 0, 3, 6)
        return x[:, :, :, :, :, None].expand(*x.shape[:5], 2, 16, 16).contiguous()

    def run():
        return [one(cut) for cut in options["cuts"]]

    return run, lambda: torch.cat([x.flatten() for x in run()])


# ---- Ceilings ----


def matmul(arrays, options):
    n, dtype = options["n"], types[options["dtype"]]
    a, b = (torch.randn(n, n, device=where, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def run():
        return torch.matmul(a, b, out=out)

    return run, lambda: run()[:1]
