/** What the library uses of an AbortSignal: so its types need neither Node's nor the DOM's. */
export interface AbortSignalLike {
  readonly aborted: boolean
  readonly reason: unknown
  throwIfAborted(): void
  addEventListener(type: 'abort', listener: () => void): void
  removeEventListener(type: 'abort', listener: () => void): void
}

const waiting = new WeakMap<AbortSignalLike, Set<() => void>>()

/**
 * Calls f when the signal aborts, until the function that this returns is called. However many wait,
 * the signal has one listener: Node warns of more than ten.
 */
export function onAbort(signal: AbortSignalLike | undefined, f: () => void): () => void {
  if (!signal) return () => {}
  let all = waiting.get(signal)
  if (!all) {
    const made = new Set<() => void>()
    all = made
    waiting.set(signal, made)
    signal.addEventListener('abort', () => {
      for (const each of [...made]) each()
    })
  }
  const own = (): void => f()
  all.add(own)
  return () => all.delete(own)
}
