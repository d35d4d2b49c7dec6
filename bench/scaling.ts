// How time and memory grow with size: `--scaling`.
import type { Benchmark } from './harness.js'
import { longAttention } from './large/attention.js'
import { cropsOf } from './large/crop_resample.js'
import { logProbsOf } from './large/log_probs.js'

const from = (start: number, factor: number, end: number): number[] =>
  start > end ? [] : [start, ...from(start * factor, factor, end)]

export const scaling: readonly Benchmark[] = [
  {
    op: 'attention',
    workloads: [
      ...from(256, 2, 16_384).map((size) =>
        longAttention(size, 72, 'f32', 'fwd', {
          backend: 'cpu',
          slow: size > 4096,
          series: { name: 'tokens', size },
        }),
      ),
      ...[...from(256, 2, 65_536), 129_600].map((size) =>
        longAttention(size, 72, 'bf16', 'fwd', {
          backend: 'cuda',
          series: { name: 'tokens', size },
        }),
      ),
    ],
  },
  {
    op: 'log_probs',
    workloads: [
      ...from(4, 4, 4096).map((size) =>
        logProbsOf(size, 32_768, 'f32', false, { series: { name: 'rows', size } }),
      ),
      ...[...from(1024, 4, 65_536), 151_936, 262_144].map((size) =>
        logProbsOf(128, size, 'f32', false, { series: { name: 'vocabulary', size } }),
      ),
    ],
  },
  {
    op: 'crop_resample',
    workloads: [
      ...[2, 4, 8, 16, 32].map((size) =>
        cropsOf(size, { height: 480, width: 640 }, 'f32', { series: { name: 'crops', size } }),
      ),
      ...[8, 16, 32, 64, 128].map((blocks) => {
        const to = { height: 16 * blocks, width: 32 * blocks }
        return cropsOf(1, to, 'f32', { series: { name: 'pixels', size: to.height * to.width } })
      }),
    ],
  },
]
