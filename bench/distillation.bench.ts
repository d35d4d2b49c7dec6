import {
  distillation,
  distillationAdvantages,
  distillationBackward,
  linearDistillation,
  linearDistillationBackward,
  type Tensor,
} from 'p2r-kernels'
import { type Block, evenly, normalBlock, normals, tiled } from './data.js'
import type { Backend, Benchmark, Workload } from './harness.js'
import type { Custom } from './shapes.js'

/** Both heads' logits in memory; with a gradient, the student's over them. */
function logits(
  rows: number,
  vocabulary: number,
  objective: 'reverse_kl' | 'jsd',
  backward: boolean,
): Workload {
  const bytes = rows * vocabulary * 4
  return {
    name: `${rows}x${vocabulary} f32 ${objective} ${backward ? 'fwd+bwd in place' : 'fwd'}`,
    traffic: { read: 2 * bytes, write: backward ? bytes : 0, inPlace: backward },
    inputs(seed) {
      const student = normals(rows * vocabulary, seed, 3)
      const teacher = normals(rows * vocabulary, seed + 1, 3)
      return {
        byteLength: 2 * bytes,
        load(device) {
          const original = device.tensor(student, [rows, vocabulary])
          const teacherLogits = device.tensor(teacher, [rows, vocabulary])
          if (!backward) {
            const a = { logits: original, teacherLogits, objective }
            return { run: () => distillation(a), answer: () => distillation(a).read() }
          }
          const work = device.zeros([rows, vocabulary])
          const dDivergence = device.tensor(new Float32Array(rows).fill(1 / rows), [rows])
          const a = { logits: work, teacherLogits, dDivergence, objective, inPlace: true }
          const run = () => distillationBackward(a).dLogits
          return { before: () => work.copyFrom(original), run, answer: () => run().read() }
        },
      }
    },
  }
}

/** Log-probabilities in, advantages out. */
function advantages(sequences: number, length: number, discount: number): Workload {
  const tokens = sequences * length
  return {
    name: `advantages of ${sequences}x${length}, discount ${discount}`,
    traffic: { read: 8 * tokens, write: 4 * tokens },
    inputs(seed) {
      const [student, teacher] = [normals(tokens, seed), normals(tokens, seed + 1)]
      return {
        byteLength: 8 * tokens,
        load(device) {
          const a = {
            logProbs: device.tensor(student, [tokens]),
            teacherLogProbs: device.tensor(teacher, [tokens]),
            cuSeqlens: evenly(sequences, length),
            discount,
          }
          const run = () => distillationAdvantages(a)
          return { run, answer: () => run().read() }
        },
      }
    },
  }
}

/** A student of `channels` and a teacher of `teacherChannels`. */
function heads(
  rows: number,
  channels: number,
  teacherChannels: number,
  vocabulary: number,
  dtype: 'f32' | 'bf16',
  backward: boolean,
  options: { backend?: Backend } = {},
): Workload {
  const width = dtype === 'f32' ? 4 : 2
  const read = width * (rows + vocabulary) * (channels + teacherChannels)
  const logitFlops = 2 * rows * vocabulary * (channels + teacherChannels)
  return {
    name: `${rows}x${channels} and ${teacherChannels} x ${vocabulary} ${dtype} ${backward ? 'fwd+bwd' : 'fwd'}`,
    // Two more products for the student's gradients.
    flops: logitFlops + (backward ? 4 * rows * vocabulary * channels : 0),
    products: dtype,
    traffic: { read, write: backward ? (width * rows + 4 * vocabulary) * channels : 0 },
    ...options,
    inputs(seed) {
      const some = (n: number) => Math.min(n, 4748)
      const head = (c: number, s: number): { hidden: Block; weight: Block } => ({
        hidden: normalBlock([rows, c], dtype, s, 1, some(rows)),
        weight: normalBlock([vocabulary, c], dtype, s + 1, c ** -0.5, some(vocabulary)),
      })
      const [student, teacher] = [head(channels, seed), head(teacherChannels, seed + 2)]
      return {
        byteLength: read,
        load(device) {
          const a = {
            hidden: tiled(device, student.hidden) as Tensor<'f32'>,
            weight: tiled(device, student.weight) as Tensor<'f32'>,
            teacherHidden: tiled(device, teacher.hidden) as Tensor<'f32'>,
            teacherWeight: tiled(device, teacher.weight) as Tensor<'f32'>,
          }
          if (!backward)
            return {
              run: () => linearDistillation(a),
              answer: () => linearDistillation(a).read(),
            }
          const dDivergence = device.tensor(new Float32Array(rows).fill(1 / rows), [rows])
          const run = () => linearDistillationBackward({ ...a, dDivergence })
          return { run, answer: () => run().dHidden.toFloat32() }
        },
      }
    },
  }
}

const custom: Custom<'T' | 'V'> = {
  letters: { T: ['rows', 128], V: ['vocabulary', 151_936] },
  dtypes: ['f32'],
  workloads: ({ T, V }) =>
    (['reverse_kl', 'jsd'] as const).flatMap((objective) => [
      logits(T, V, objective, false),
      logits(T, V, objective, true),
    ]),
}

export default {
  op: 'distillation',
  workloads: [
    logits(128, 151_936, 'reverse_kl', false),
    logits(128, 151_936, 'reverse_kl', true),
    logits(128, 151_936, 'jsd', true),
    advantages(512, 1024, 0.9),
    heads(256, 1024, 2048, 32_000, 'f32', false),
    heads(256, 1024, 2048, 32_000, 'f32', true),
    heads(256, 1024, 2048, 32_000, 'bf16', true),
    heads(4096, 2560, 4096, 151_936, 'bf16', false, { backend: 'cuda' }),
    heads(4096, 2560, 4096, 151_936, 'bf16', true, { backend: 'cuda' }),
  ],
  custom,
} satisfies Benchmark
