// PyTorch, Triton and torchvision (pytorch.py, triton_log_probs.py), if Python has them.
import type { Block } from '../data.js'
import type { Backend, Peer } from '../harness.js'
import { pythonPeer } from './python.js'
import type { Cut, Picture } from './sharp.js'

/** Largest difference between two roundings of the same numbers to bf16. */
const bf16Tolerance = 2e-2
const f32Tolerance = 1e-4
const toleranceOf = ({ dtype }: Block): number => (dtype === 'f32' ? f32Tolerance : bf16Tolerance)
const both: readonly Backend[] = ['cpu', 'cuda']

/** How many of the last rows of a large result are compared. */
export const lastRows = 512

const attentions = {
  flash3: { name: 'FlashAttention-3', call: 'flash3' },
  cudnn: { name: 'cuDNN', call: 'cudnn_frontend' },
  'sdpa cudnn': { name: 'PyTorch SDPA, cuDNN', call: 'sdpa', backend: 'cudnn' },
  'sdpa flash': { name: 'PyTorch SDPA, flash', call: 'sdpa', backend: 'flash' },
  sdpa: { name: 'PyTorch SDPA', call: 'sdpa', backend: '' },
} as const

/**
 * Attention over sequences of one length, q, k and v [T, H, D]: of libraries of their own, or of PyTorch by a backend
 * or by its choice. Compared are the last rows of out or, of a backward pass, of dK.
 */
export function attentionPeer(
  kind: keyof typeof attentions,
  arrays: { q: Block; k: Block; v: Block; dOut: Block },
  options: {
    sequences: number
    pass: 'fwd' | 'bwd' | 'fwd+bwd'
    deterministic?: boolean
    /** 0 for all rows. */
    last?: number
  },
): Peer {
  const { name, call, ...backend } = attentions[kind]
  return pythonPeer({
    name,
    script: 'pytorch',
    call,
    tolerance: toleranceOf(arrays.q),
    backends: kind === 'sdpa' ? both : ['cuda'],
    arrays: () => arrays,
    options: { deterministic: false, last: lastRows, ...options, ...backend },
  })
}

export function torchLogSoftmaxGather(logits: Block, targets: Block): Peer {
  return pythonPeer({
    name: 'PyTorch log_softmax, gather',
    script: 'pytorch',
    call: 'log_softmax_gather',
    tolerance: f32Tolerance,
    backends: both,
    arrays: () => ({ logits, targets }),
  })
}

export function tritonLogProbs(logits: Block, targets: Block): Peer {
  return pythonPeer({
    name: 'Triton, one pass',
    script: 'triton_log_probs',
    call: 'log_probs',
    tolerance: f32Tolerance,
    backends: ['cuda'],
    arrays: () => ({ logits, targets }),
  })
}

/** Forward and backward; compared are the last rows of the gradient. */
export function crossEntropy(logits: Block, targets: Block): Peer {
  return pythonPeer({
    name: 'PyTorch cross_entropy',
    script: 'pytorch',
    call: 'cross_entropy',
    tolerance: toleranceOf(logits),
    backends: both,
    arrays: () => ({ logits, targets }),
    options: { last: lastRows },
  })
}

export function torchLinearLogProbs(hidden: Block, weight: Block, targets: Block): Peer {
  return pythonPeer({
    name: 'PyTorch matmul in chunks',
    script: 'pytorch',
    call: 'linear_log_probs',
    tolerance: toleranceOf(hidden),
    backends: both,
    arrays: () => ({ hidden, weight, targets }),
    options: { chunk: 2048 },
  })
}

/** On-policy PPO with token-mean; compared is dHidden. */
export function torchLinearPolicyLoss(
  hidden: Block,
  weight: Block,
  targets: Block,
  advantages: Block,
): Peer {
  return pythonPeer({
    name: 'PyTorch autograd',
    script: 'pytorch',
    call: 'linear_policy_loss',
    tolerance: toleranceOf(hidden),
    backends: both,
    arrays: () => ({ hidden, weight, targets, advantages }),
  })
}

/** torchvision's antialiased bicubic: the same weights, other roundings. */
export function torchvisionResize(
  { data, height, width }: Picture,
  cuts: readonly Cut[],
  options: { patches: boolean; dtype: 'f32' | 'bf16' },
): Peer {
  return pythonPeer({
    name: options.patches ? 'torchvision, patches' : 'torchvision',
    script: 'pytorch',
    call: 'resized',
    tolerance: 0.02,
    backends: both,
    arrays: () => ({ image: { data, dtype: 'u8', shape: [height, width, 3] } }),
    options: { cuts, ...options },
  })
}

/** A product of two n × n matrices, for a ceiling. */
export function matmul(n: number, dtype: 'f32' | 'bf16'): Peer {
  return pythonPeer({
    name: 'PyTorch matmul',
    script: 'pytorch',
    call: 'matmul',
    tolerance: 0,
    backends: ['cuda'],
    arrays: () => ({}),
    options: { n, dtype },
  })
}
