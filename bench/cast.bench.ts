import type { DType } from 'p2r-kernels'
import { normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import type { Custom } from './shapes.js'

const widths = { f32: 4, f16: 2, bf16: 2, i32: 4, u8: 1 } as const

/** 8 Mi for 2^23. */
export const mebi = (n: number): string => (n % 2 ** 20 ? String(n) : `${n / 2 ** 20} Mi`)

function workload(size: number, from: DType, to: DType): Workload {
  const bytes = size * widths[from]
  return {
    name: `${mebi(size)} ${from} -> ${to}`,
    traffic: { read: bytes, write: size * widths[to] },
    inputs(seed) {
      const data = normals(size, seed)
      return {
        byteLength: bytes,
        load(device) {
          const x = device.tensor(data, [size], from)
          return { run: () => x.cast(to) }
        },
      }
    },
  }
}

const elements = 1 << 23

const custom: Custom<'N'> = {
  letters: { N: ['elements', elements] },
  dtypes: ['f32', 'bf16', 'f16'],
  workloads: ({ N }, dtype) =>
    (['f32', 'bf16', 'f16'] as const)
      .filter((to) => to !== dtype)
      .map((to) => workload(N, dtype, to)),
}

export default {
  op: 'cast',
  workloads: [
    workload(elements, 'f32', 'bf16'),
    workload(elements, 'bf16', 'f32'),
    workload(elements, 'f32', 'f16'),
  ],
  custom,
} satisfies Benchmark
