import { describeValue } from './arguments.js'
import { refuse } from './errors.js'

/** The part of AbortSignal that the library uses, so that its types need neither Node's nor the DOM's. */
export interface AbortSignalLike {
  /** Whether it has aborted. */
  readonly aborted: boolean
  /** Why: what a promise rejects with. */
  readonly reason: unknown
  /** Throws the reason if it has aborted. */
  throwIfAborted(): void
  /** Calls the listener when it aborts. */
  addEventListener(type: 'abort', listener: () => void): void
  /** Forgets a listener. */
  removeEventListener(type: 'abort', listener: () => void): void
}

/** @internal The argument `signal`, which may be left out. */
export function checkSignal(
  signal: AbortSignalLike | undefined,
  op: string,
): AbortSignalLike | undefined {
  if (signal === undefined) return undefined
  const given = signal as Partial<AbortSignalLike> | null
  if (typeof given?.throwIfAborted !== 'function' || typeof given.addEventListener !== 'function')
    refuse('ERR_VALUE', op, `signal must be an AbortSignal, got ${describeValue(signal)}`)
  return signal
}

const listeners = new WeakMap<AbortSignalLike, Set<() => void>>()

/**
 * Calls f when the signal aborts; the returned function unsubscribes it. All callbacks of a signal share
 * one listener, because Node warns about more than ten.
 */
export function onAbort(signal: AbortSignalLike | undefined, f: () => void): () => void {
  if (!signal) return () => {}
  let all = listeners.get(signal)
  if (!all) {
    const made = new Set<() => void>()
    all = made
    listeners.set(signal, made)
    signal.addEventListener('abort', () => {
      for (const each of [...made]) each()
    })
  }
  const own = (): void => f()
  all.add(own)
  return () => all.delete(own)
}

/** Resolves after a delay; an abort rejects with the signal's reason. */
export function sleep(milliseconds: number, signal?: AbortSignalLike): Promise<void> {
  signal?.throwIfAborted()
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => {
      forget()
      resolve()
    }, milliseconds)
    const forget = onAbort(signal, () => {
      clearTimeout(timer)
      forget()
      reject(signal?.reason)
    })
  })
}
