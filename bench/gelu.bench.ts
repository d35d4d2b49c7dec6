import { gelu, geluBackward } from 'p2r-kernels'
import { normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import { geluLoop } from './peers/loops.js'

const size = 1024 * 4304

function workload(approximate: 'none' | 'tanh', backward: boolean): Workload {
  return {
    name: `1024x4304 f32 ${approximate === 'none' ? 'erf' : 'tanh'} ${backward ? 'bwd' : 'fwd'}`,
    traffic: { read: size * 4 * (backward ? 2 : 1), write: size * 4 },
    inputs(seed) {
      const x = normals(size, seed)
      const gradient = normals(size, seed + 1)
      return {
        byteLength: size * 4 * (backward ? 2 : 1),
        load(device) {
          const a = { x: device.tensor(x, [size]), approximate }
          if (!backward) return { run: () => gelu(a), answer: () => gelu(a).read() }
          const dOut = device.tensor(gradient, [size])
          return { run: () => geluBackward({ ...a, dOut }) }
        },
        peers: backward || approximate === 'none' ? [] : [geluLoop(x)],
      }
    },
  }
}

export default {
  op: 'gelu',
  workloads: [workload('none', false), workload('tanh', false), workload('tanh', true)],
} satisfies Benchmark
