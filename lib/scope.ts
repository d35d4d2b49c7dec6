import { AsyncLocalStorage } from 'node:async_hooks'
import { checkFunction } from './arguments.js'

interface Disposes {
  dispose(): void
}

const scopes = new AsyncLocalStorage<Set<Disposes>>()
const owners = new WeakMap<Disposes, Set<Disposes>>()

/** Registers what the current scope, if any, disposes at its end. */
export function track(tensor: Disposes): void {
  own(tensor, scopes.getStore())
}

/** Forgets a disposed tensor, so that a scope around a long loop does not grow. */
export function untrack(tensor: Disposes): void {
  owners.get(tensor)?.delete(tensor)
}

function own(tensor: Disposes, scope: Set<Disposes> | undefined): void {
  if (!scope) return
  scope.add(tensor)
  owners.set(tensor, scope)
}

function release(made: Set<Disposes>, result: unknown): void {
  const outer = scopes.getStore()
  const seen = new Set<unknown>()
  const keep = (value: unknown): void => {
    if (typeof value !== 'object' || value === null || seen.has(value)) return
    seen.add(value)
    if (made.delete(value as Disposes)) own(value as Disposes, outer)
    if (ArrayBuffer.isView(value)) return
    const inner = value instanceof Map || value instanceof Set ? [...value] : Object.values(value)
    for (const v of inner) keep(v)
    for (const v of heldBy(value)) keep(v)
  }
  keep(result)
  for (const tensor of made) tensor.dispose()
}

/** Runs f outside of all scopes: what it makes belongs to an object that disposes it. */
export function unscoped<R>(f: () => R): R {
  return scopes.exit(f)
}

/** The method by which an object yields the tensors in its private fields to a scope. */
export const holds: unique symbol = Symbol('holds')

/** What an object's `holds` method yields; nothing without one. */
export function heldBy(value: object): Iterable<unknown> {
  return (value as { [holds]?: () => Iterable<unknown> })[holds]?.() ?? []
}

/**
 * Runs f and disposes every tensor made in it, on any device, that its result does not hold. The
 * result is searched through arrays, maps, sets and the enumerable properties of objects.
 *
 * @throws P2RError ERR_VALUE for anything but a function. An error of f is thrown as it is.
 * @example
 * ```js
 * import { gelu, openDevice, scope } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const y = scope(() => {
 *   const x = device.tensor([1, 2, 3], [3]) // disposed at the end
 *   return gelu({ x })
 * })
 * console.log(y.shape, device.memory().liveBytes) // [ 3 ] 12
 * device.dispose()
 * ```
 */
export function scope<R>(f: () => R): R {
  checkFunction(f, 'f', 'scope')
  const made = new Set<Disposes>()
  let result: R | undefined
  try {
    result = scopes.run(made, f)
    return result
  } finally {
    release(made, result)
  }
}

/**
 * As `scope`, for an asynchronous function: tensors made across its awaits are included.
 *
 * @throws P2RError ERR_VALUE for anything but a function. An error of f is thrown as it is.
 * @example
 * ```js
 * import { openDevice, scopeAsync } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const values = await scopeAsync(async () => device.tensor([1, 2], [2]).cast('f16').toFloat32())
 * console.log(values, device.memory().liveBytes) // Float32Array(2) [ 1, 2 ] 0
 * device.dispose()
 * ```
 */
export async function scopeAsync<R>(f: () => Promise<R>): Promise<R> {
  checkFunction(f, 'f', 'scopeAsync')
  const made = new Set<Disposes>()
  let result: R | undefined
  try {
    result = await scopes.run(made, f)
    return result
  } finally {
    release(made, result)
  }
}
