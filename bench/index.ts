/**
 * `p2r-kernels/bench`: the harness of this package's own benchmarks, for those of its users.
 *
 * ```js
 * import { gelu, openDevice } from 'p2r-kernels'
 * import { cpuCeilings, measure, quick, table, withShare } from 'p2r-kernels/bench'
 *
 * const n = 1 << 16
 * const workload = {
 *   name: `${n} f32`,
 *   traffic: { read: 4 * n, write: 4 * n },
 *   inputs: () => ({
 *     byteLength: 4 * n,
 *     load(device) {
 *       const x = device.tensor(new Float32Array(n), [n])
 *       return { run: () => gelu({ x }) }
 *     },
 *   }),
 * }
 * const effort = { ...quick, cacheBytes: 1 << 25, peers: false, ceilings: cpuCeilings }
 * const rows = await measure('gelu', workload, openDevice('cpu'), effort, console.warn)
 * console.log(table(rows.map((row) => withShare(row, []))))
 * ```
 *
 * @module
 */
export { cpuCeilings } from './ceilings.js'
export {
  type Backend,
  type Benchmark,
  type Effort,
  type Inputs,
  type Loaded,
  measure,
  type Peer,
  PeerAbsent,
  type PeerRun,
  quick,
  type Series,
  type Traffic,
  thorough,
  type Workload,
} from './harness.js'
export {
  type CeilingKind,
  type Ceilings,
  type Change,
  type Comparison,
  cacheBytes,
  compare,
  parseResults,
  type Results,
  type Row,
  withShare,
} from './results.js'
export type { Custom } from './shapes.js'
export { comparisonReport, report, table } from './table.js'
