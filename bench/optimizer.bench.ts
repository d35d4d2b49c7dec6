import { adamW, clipGradNorm } from 'p2r-kernels'
import { mebi } from './cast.bench.js'
import { normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import { type Custom, standard } from './shapes.js'

function workloads(size: number): Workload[] {
  const bytes = size * 4
  return [
    {
      name: `adamW ${mebi(size)} f32`,
      // Parameter and both moments are read and written, the gradient is read.
      traffic: { read: 4 * bytes, write: 3 * bytes, inPlace: true },
      inputs: (seed) => ({
        byteLength: 4 * bytes,
        load(device) {
          const a = {
            params: [device.tensor(normals(size, seed), [size])],
            grads: [device.tensor(normals(size, seed + 1, 1e-3), [size])],
            moments: [device.zeros([2, size])],
            lr: 1e-5,
          }
          let step = 1
          return { run: () => adamW({ ...a, step: step++ }) }
        },
      }),
    },
    {
      name: `clipGradNorm ${mebi(size)} f32, not clipped`,
      traffic: { read: bytes, write: 0 },
      inputs: (seed) => ({
        byteLength: bytes,
        load(device) {
          const grads = [device.tensor(normals(size, seed), [size])]
          return { run: () => clipGradNorm({ grads, maxNorm: 1e9 }) }
        },
      }),
    },
  ]
}

const custom: Custom<'N'> = {
  letters: { N: ['elements', 1 << 23] },
  dtypes: ['f32'],
  workloads: ({ N }) => workloads(N),
}

export default {
  op: 'optimizer',
  workloads: standard(custom),
  custom,
} satisfies Benchmark
