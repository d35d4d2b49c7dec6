import {
  mergeLogProbs,
  tokenLogProbs,
  tokenLogProbsBackward,
  tokenLogProbsShard,
} from 'p2r-kernels'
import { integers, normals } from './data.js'
import type { Benchmark, Inputs, Workload } from './harness.js'
import { logProbsOnCuda } from './large/log_probs.js'
import { logProbsLoop } from './peers/loops.js'
import { logSoftmaxGather, softmaxScatter } from './peers/onnxruntime.js'

const rows = 256
const vocabulary = 151_936
const bytes = rows * vocabulary * 4

function host(seed: number) {
  return {
    logits: normals(rows * vocabulary, seed, 3),
    targets: integers(rows, vocabulary, seed),
  }
}

const forward: Workload = {
  name: `${rows}x${vocabulary} f32 fwd`,
  traffic: { read: bytes, write: 0 },
  inputs(seed): Inputs {
    const { logits, targets } = host(seed)
    return {
      byteLength: bytes,
      load(device) {
        const a = {
          logits: device.tensor(logits, [rows, vocabulary]),
          targets: device.tensor(targets, [rows]),
        }
        return { run: () => tokenLogProbs(a), answer: () => tokenLogProbs(a).logProbs.read() }
      },
      peers: [logSoftmaxGather(logits, targets), logProbsLoop(logits, targets)],
    }
  },
}

const both: Workload = {
  name: `${rows}x${vocabulary} f32 fwd+bwd in place`,
  // The logits are read at least once and their gradient written over them.
  traffic: { read: bytes, write: bytes, inPlace: true },
  inputs(seed): Inputs {
    const { logits, targets } = host(seed)
    return {
      byteLength: bytes,
      load(device) {
        const original = device.tensor(logits, [rows, vocabulary])
        const work = device.zeros([rows, vocabulary])
        const a = { logits: work, targets: device.tensor(targets, [rows]) }
        const dLogProbs = device.tensor(new Float32Array(rows).fill(1), [rows])
        const run = () => {
          const { stats } = tokenLogProbs(a)
          return tokenLogProbsBackward({ ...a, stats, dLogProbs, inPlace: true })
        }
        return { before: () => work.copyFrom(original), run, answer: () => run().read() }
      },
      peers: [softmaxScatter(logits, targets)],
    }
  },
}

/** All shards in one process: each is read once, and the merge is small. */
const sharded: Workload = {
  name: `${rows}x${vocabulary} f32 in 8 shards`,
  traffic: { read: bytes, write: 0 },
  inputs(seed) {
    const width = vocabulary / 8
    const targets = integers(rows, vocabulary, seed)
    return {
      byteLength: bytes,
      load(device) {
        const shards = Array.from({ length: 8 }, (_, i) => ({
          logits: device.tensor(normals(rows * width, 8 * seed + i, 3), [rows, width]),
          targets: device.tensor(targets, [rows]),
          vocabOffset: i * width,
        }))
        return { run: () => mergeLogProbs(shards.map((shard) => tokenLogProbsShard(shard))) }
      },
    }
  },
}

export default {
  op: 'log_probs',
  workloads: [forward, both, sharded, ...logProbsOnCuda],
} satisfies Benchmark
