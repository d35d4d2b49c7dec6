import { AsyncLocalStorage } from 'node:async_hooks'
import { type AbortSignalLike, checkSignal, onAbort } from './abort.js'
import { checkArguments, checkFunction, type Names } from './arguments.js'
import { abortScopes, native } from './native.js'

interface Disposes {
  dispose(): void
}

interface Scope {
  /** What it disposes at its end. */
  made: Set<Disposes>
  /** Those that can abort it: its own, and those around it. */
  signals: readonly AbortSignalLike[]
  /** By which the addon knows it; 0 where nothing can abort it. */
  abort: number
}

const scopes = new AsyncLocalStorage<Scope>()
const owners = new WeakMap<Disposes, Set<Disposes>>()

/** Registers what the current scope, if any, disposes at its end. */
export function track(tensor: Disposes): void {
  own(tensor, scopes.getStore()?.made)
}

abortScopes.current = () => scopes.getStore()?.abort ?? 0

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
  const outer = scopes.getStore()?.made
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
  const { signals = [], abort = 0 } = scopes.getStore() ?? {}
  let result: R | undefined
  try {
    result = scopes.run({ made, signals, abort }, f)
    return result
  } finally {
    release(made, result)
  }
}

/** How an asynchronous scope can end early. */
export interface ScopeOptions {
  /**
   * Once it aborts, `scopeAsync` rejects with its reason as soon as f has settled, and disposes all that was made.
   * On the CPU the operations that f queued and that have not begun are left out: a tensor that one of
   * them would have written is unusable, and its `read` rejects. On CUDA they are computed.
   *
   * @default none
   */
  signal?: AbortSignalLike
}

const optionNames: Names<ScopeOptions> = { signal: true }

/**
 * As `scope`, for an asynchronous function: tensors made across its awaits are included.
 *
 * @throws P2RError ERR_VALUE for anything but a function, and for options. An error of f is thrown as it is; after an
 *   abort the signal's reason is.
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
export async function scopeAsync<R>(f: () => Promise<R>, options: ScopeOptions = {}): Promise<R> {
  const op = 'scopeAsync'
  checkFunction(f, 'f', op)
  const own = checkSignal(checkArguments(options, optionNames, op, 'options').signal, op)
  own?.throwIfAborted()
  const made = new Set<Disposes>()
  const outer = scopes.getStore()
  const signals = own ? [own, ...(outer?.signals ?? [])] : (outer?.signals ?? [])
  const abort = own ? native().openAbort() : (outer?.abort ?? 0)
  const forget = own ? signals.map((signal) => onAbort(signal, () => native().abort(abort))) : []
  if (own) abortScopes.open++
  let result: R | undefined
  try {
    const settled = await scopes.run({ made, signals, abort }, f)
    own?.throwIfAborted()
    result = settled
    return result
  } catch (error) {
    own?.throwIfAborted()
    throw error
  } finally {
    if (own) {
      for (const each of forget) each()
      native().closeAbort(abort)
      if (--abortScopes.open === 0) native().abortBy(0)
    }
    release(made, result)
  }
}
