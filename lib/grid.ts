import { refuse } from './errors.js'
import { describeValue } from './tensor.js'

/** Patches of one image or video: frames, rows, columns. */
export type Grid = readonly [t: number, h: number, w: number]

/** @internal A list of grids; each entry a whole number of at least 0, h and w multiples of merge. */
export function checkGrids(value: unknown, mergeSize: number, op: string): readonly Grid[] {
  if (!Array.isArray(value))
    refuse('ERR_VALUE', op, `gridThw must be a list of [t, h, w], got ${describeValue(value)}`)
  value.forEach((grid: unknown, i) => {
    const list = grid as ArrayLike<unknown> | null | undefined
    if (typeof list !== 'object' || list === null || list.length !== 3)
      refuse('ERR_VALUE', op, `gridThw[${i}] must be [t, h, w], got ${describeValue(grid)}`)
    for (let axis = 0; axis < 3; axis++) checkWhole(list[axis], 0, `gridThw[${i}][${axis}]`, op)
    const [, h, w] = grid as Grid
    if (h % mergeSize !== 0 || w % mergeSize !== 0)
      refuse(
        'ERR_VALUE',
        op,
        `gridThw[${i}] must have h and w that mergeSize ${mergeSize} divides, got ${h} x ${w}`,
      )
  })
  return value as Grid[]
}

/** @internal A whole number from least to 2^31-1. */
export function checkWhole(value: unknown, least: number, name: string, op: string): number {
  if (!Number.isInteger(value) || (value as number) < least || (value as number) > 2 ** 31 - 1)
    refuse(
      'ERR_VALUE',
      op,
      `${name} must be an integer from ${least} to 2147483647, got ${describeValue(value)}`,
    )
  return value as number
}
