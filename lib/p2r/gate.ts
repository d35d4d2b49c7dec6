import { type AbortSignalLike, onAbort } from '../abort.js'

/**
 * How much to have under way for `concurrency` requests in flight: half as much again, so that the next
 * one is ready while images are read, cut and encoded.
 */
export const underWay = (concurrency: number): number => Math.ceil(1.5 * concurrency) + 4

/** Lets at most `width` callers in at once, in the order of their coming. */
export class Gate {
  #free: number
  readonly #waiting: (() => void)[] = []

  constructor(width: number) {
    this.#free = width
  }

  /** Runs f when there is room. An aborted signal rejects with its reason, also while waiting. */
  async through<R>(f: () => Promise<R>, signal?: AbortSignalLike): Promise<R> {
    await this.#enter(signal)
    try {
      return await f()
    } finally {
      const next = this.#waiting.shift()
      if (next) next()
      else this.#free++
    }
  }

  #enter(signal?: AbortSignalLike): Promise<void> | void {
    signal?.throwIfAborted()
    if (this.#free > 0) {
      this.#free--
      return
    }
    return new Promise((resolve, reject) => {
      const enter = (): void => {
        forget()
        resolve()
      }
      const forget = onAbort(signal, () => {
        this.#waiting.splice(this.#waiting.indexOf(enter), 1)
        forget()
        reject(signal?.reason)
      })
      this.#waiting.push(enter)
    })
  }
}

/**
 * f of every item, at most `width` at once, as they finish. The items are drawn when there is room,
 * so that a list of any length costs no memory. What f throws ends it; so does the consumer.
 */
export async function* mapUnordered<T, R>(
  items: Iterable<T> | AsyncIterable<T>,
  width: number,
  f: (item: T, index: number) => Promise<R>,
): AsyncGenerator<R> {
  const source =
    Symbol.asyncIterator in items ? items[Symbol.asyncIterator]() : items[Symbol.iterator]()
  const running = new Map<number, Promise<{ at: number; result: R }>>()
  let next = 0
  let more = true
  try {
    while (more || running.size) {
      while (more && running.size < width) {
        const item = await source.next()
        if (item.done) {
          more = false
          break
        }
        const at = next++
        running.set(
          at,
          f(item.value, at).then((result) => ({ at, result })),
        )
      }
      if (!running.size) break
      const { at, result } = await Promise.race(running.values())
      running.delete(at)
      yield result
    }
  } finally {
    for (const promise of running.values()) promise.catch(() => {})
    await source.return?.()
  }
}

/** Waits, or rejects with the signal's reason. */
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
