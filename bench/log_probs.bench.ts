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
import { type Custom, type Float, floats, widths } from './shapes.js'

type Sizes = readonly [rows: number, vocabulary: number]

function host([rows, vocabulary]: Sizes, seed: number) {
  return {
    logits: normals(rows * vocabulary, seed, 3),
    targets: integers(rows, vocabulary, seed),
  }
}

const forward = ([rows, vocabulary]: Sizes, dtype: Float): Workload => ({
  name: `${rows}x${vocabulary} ${dtype} fwd`,
  traffic: { read: rows * vocabulary * widths[dtype], write: 0 },
  inputs(seed): Inputs {
    const { logits, targets } = host([rows, vocabulary], seed)
    return {
      byteLength: rows * vocabulary * widths[dtype],
      load(device) {
        const a = {
          logits: device.tensor(logits, [rows, vocabulary], dtype),
          targets: device.tensor(targets, [rows]),
        }
        return { run: () => tokenLogProbs(a), answer: () => tokenLogProbs(a).logProbs.read() }
      },
      peers:
        dtype === 'f32' ? [logSoftmaxGather(logits, targets), logProbsLoop(logits, targets)] : [],
    }
  },
})

const both = ([rows, vocabulary]: Sizes, dtype: Float): Workload => ({
  name: `${rows}x${vocabulary} ${dtype} fwd+bwd in place`,
  // The logits are read at least once and their gradient written over them.
  traffic: {
    read: rows * vocabulary * widths[dtype],
    write: rows * vocabulary * widths[dtype],
    inPlace: true,
  },
  inputs(seed): Inputs {
    const { logits, targets } = host([rows, vocabulary], seed)
    return {
      byteLength: rows * vocabulary * widths[dtype],
      load(device) {
        const original = device.tensor(logits, [rows, vocabulary], dtype)
        const work = device.zeros([rows, vocabulary], dtype)
        const a = { logits: work, targets: device.tensor(targets, [rows]) }
        const dLogProbs = device.tensor(new Float32Array(rows).fill(1), [rows])
        const run = () => {
          const { stats } = tokenLogProbs(a)
          return tokenLogProbsBackward({ ...a, stats, dLogProbs, inPlace: true })
        }
        return { before: () => work.copyFrom(original), run, answer: () => run().toFloat32() }
      },
      peers: dtype === 'f32' ? [softmaxScatter(logits, targets)] : [],
    }
  },
})

/** All shards in one process: each is read once, and the merge is small. */
const sharded = ([rows, vocabulary]: Sizes, dtype: Float): Workload => ({
  name: `${rows}x${vocabulary} ${dtype} in 8 shards`,
  traffic: { read: rows * vocabulary * widths[dtype], write: 0 },
  inputs(seed) {
    const width = vocabulary / 8
    const targets = integers(rows, vocabulary, seed)
    return {
      byteLength: rows * vocabulary * widths[dtype],
      load(device) {
        const shards = Array.from({ length: 8 }, (_, i) => ({
          logits: device.tensor(normals(rows * width, 8 * seed + i, 3), [rows, width], dtype),
          targets: device.tensor(targets, [rows]),
          vocabOffset: i * width,
        }))
        return { run: () => mergeLogProbs(shards.map((shard) => tokenLogProbsShard(shard))) }
      },
    }
  },
})

const sizes: Sizes = [256, 151_936]

const custom: Custom<'T' | 'V'> = {
  letters: { T: ['rows', sizes[0]], V: ['vocabulary', sizes[1]] },
  dtypes: floats,
  workloads: ({ T, V }, dtype) => [
    forward([T, V], dtype),
    both([T, V], dtype),
    ...(V % 8 ? [] : [sharded([T, V], dtype)]),
  ],
}

export default {
  op: 'log_probs',
  workloads: [forward(sizes, 'f32'), both(sizes, 'f32'), sharded(sizes, 'f32'), ...logProbsOnCuda],
  custom,
} satisfies Benchmark
