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


def passes(arrays, options, forward):
    """The pass that is asked for, of out = forward(q, k, v) on [sequence, T, H, D]; compared are the last rows of out
    or, of a backward pass, of dK."""
    q, k, v, d_out = (arrays[name].unflatten(0, (options["sequences"], -1)) for name in ("q", "k", "v", "dOut"))
    last = options["last"]
    if options["pass"] == "fwd":
        return lambda: forward(q, k, v), lambda: forward(q, k, v).flatten(0, 1)[-last:]
    for x in (q, k, v):
        x.requires_grad_()
    kept = forward(q, k, v) if options["pass"] == "bwd" else None

    def backward():
        out = forward(q, k, v) if kept is None else kept
        return torch.autograd.grad(out, (q, k, v), d_out, retain_graph=kept is not None)

    return backward, lambda: backward()[1].flatten(0, 1)[-last:]


def sdpa(arrays, options):
    """PyTorch's by the backend that is named, or whichever it takes."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    named = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    backends = [named[options["backend"]]] if options["backend"] else list(SDPBackend.__members__.values())

    def forward(*tensors):
        with sdpa_kernel(backends):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors)).transpose(1, 2)

    run, answer = passes(arrays, options, forward)

    def deterministically(run):
        torch.use_deterministic_algorithms(options["deterministic"])
        try:
            return run()
        finally:
            torch.use_deterministic_algorithms(False)

    return lambda: deterministically(run), lambda: deterministically(answer)


def flash3(arrays, options):
    """FlashAttention-3, as its repository's hopper/ builds it."""
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError as error:
        raise Absent("FlashAttention-3 (flash_attn_interface) is not installed") from error

    def forward(q, k, v):
        out = flash_attn_func(q, k, v, deterministic=options["deterministic"])
        return out[0] if isinstance(out, tuple) else out

    return passes(arrays, options, forward)


def cudnn_frontend(arrays, options):
    """cuDNN by its own frontend: a graph for each pass, with the plan that its heuristics choose."""
    try:
        import cudnn
    except ImportError as error:
        raise Absent("cuDNN's frontend (the package nvidia-cudnn-frontend) is not installed") from error

    if options["pass"] == "fwd+bwd":
        raise Absent("cuDNN's frontend is timed one pass at a time")
    handle = cudnn.create_handle()
    # [sequence, H, T, D], as views of [T, H, D].
    q, k, v, d_out = (
        arrays[name].unflatten(0, (options["sequences"], -1)).transpose(1, 2) for name in ("q", "k", "v", "dOut")
    )
    out = torch.empty_like(q)
    stats = torch.empty(*q.shape[:3], 1, device=where)
    scale = q.shape[-1] ** -0.5
    io = {torch.float16: cudnn.data_type.HALF, torch.bfloat16: cudnn.data_type.BFLOAT16}[q.dtype]

    def built(describe):
        graph = cudnn.pygraph(
            handle=handle,
            io_data_type=io,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
        )
        places = {}

        def given(x):
            tensor = graph.tensor_like(x)
            places[tensor] = x
            return tensor

        def made(tensor, x):
            tensor.set_output(True).set_dim(list(x.shape)).set_stride(list(x.stride()))
            if x.dtype == torch.float32:
                tensor.set_data_type(cudnn.data_type.FLOAT)
            places[tensor] = x

        describe(graph, given, made)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        workspace = torch.empty(max(1, graph.get_workspace_size()), device=where, dtype=torch.uint8)

        def run():
            cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
            graph.execute(places, workspace, handle=handle)

        return run

    def forward(graph, given, made):
        o, lse = graph.sdpa(q=given(q), k=given(k), v=given(v), generate_stats=True, attn_scale=scale)
        made(o, out)
        made(lse, stats)

    run = built(forward)
    last = options["last"]

    def rows(x):
        return x.transpose(1, 2).flatten(0, 1)[-last:]

    def after(run, result):
        run()
        return rows(result)

    if options["pass"] == "fwd":
        return run, lambda: after(run, out)
    run()
    d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))

    def backward(graph, given, made):
        gradients = graph.sdpa_backward(
            q=given(q),
            k=given(k),
            v=given(v),
            o=given(out),
            dO=given(d_out),
            stats=given(stats),
            attn_scale=scale,
            use_deterministic_algorithm=options["deterministic"],
        )
        for gradient, x in zip(gradients, (d_q, d_k, d_v)):
            made(gradient, x)

    run = built(backward)
    return run, lambda: after(run, d_k)


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
