import { checkArray, checkInt32, describeValue } from './arguments.js'
import { refuse } from './errors.js'

/** Patches of one image or video: frames, rows, columns. An image has one frame (of temporalPatchSize copies). */
export type Grid = readonly [t: number, h: number, w: number]

/** @internal A copy of a list of grids; entries are integers of at least 0, h and w multiples of mergeSize. */
export function checkGrids(
  value: unknown,
  mergeSize: number,
  op: string,
  name = 'gridThw',
): readonly Grid[] {
  const grids = checkArray(value as readonly unknown[], name, op, 'a list of [t, h, w]')
  const copy: Grid[] = []
  for (let i = 0; i < grids.length; i++) {
    const list = grids[i] as ArrayLike<unknown> | null | undefined
    if (typeof list !== 'object' || list === null || list.length !== 3)
      refuse('ERR_VALUE', op, `${name}[${i}] must be [t, h, w], got ${describeValue(list)}`)
    const size = (axis: number) => checkInt32(list[axis], 0, `${name}[${i}][${axis}]`, op)
    const [t, h, w] = [size(0), size(1), size(2)]
    if (h % mergeSize !== 0 || w % mergeSize !== 0)
      refuse(
        'ERR_VALUE',
        op,
        `${name}[${i}] must have h and w that mergeSize ${mergeSize} divides, got ${h} x ${w}`,
      )
    copy.push([t, h, w])
  }
  return copy
}
