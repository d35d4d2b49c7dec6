import { type AbortSignalLike, onAbort } from '../abort.js'

/**
 * Items to work on at once for `concurrency` requests in flight: half as many again, so that the next
 * request is ready while other images are loaded, cropped and encoded.
 */
export function pipelineDepth(concurrency: number): number {
  return Math.ceil(1.5 * concurrency) + 4
}

/** At most `permits` tasks run at once; the others wait in the order of their calls. */
export class Semaphore {
  #free: number
  readonly #waiting: (() => void)[] = []

  constructor(permits: number) {
    this.#free = permits
  }

  /** Runs f when a permit is free. An abort, also while waiting, rejects with the signal's reason. */
  async run<R>(f: () => Promise<R>, signal?: AbortSignalLike): Promise<R> {
    await this.#acquire(signal)
    try {
      return await f()
    } finally {
      const next = this.#waiting.shift()
      if (next) next()
      else this.#free++
    }
  }

  #acquire(signal?: AbortSignalLike): Promise<void> | void {
    signal?.throwIfAborted()
    if (this.#free > 0) {
      this.#free--
      return
    }
    return new Promise((resolve, reject) => {
      const acquired = (): void => {
        forget()
        resolve()
      }
      const forget = onAbort(signal, () => {
        this.#waiting.splice(this.#waiting.indexOf(acquired), 1)
        forget()
        reject(signal?.reason)
      })
      this.#waiting.push(acquired)
    })
  }
}

/**
 * Bounds the bytes of images that are held at once. How many an image has is known once it is loaded, so that few are
 * loaded at a time, and none while those that are held reach the limit.
 */
export class ImageGate {
  readonly #loading: Semaphore
  readonly #limit: number
  readonly #waiting: (() => void)[] = []
  #held = 0

  constructor(limit: number, loadedAtOnce: number) {
    this.#limit = limit
    this.#loading = new Semaphore(loadedAtOnce)
  }

  /** Loads an image when there is room for it; the caller releases its bytes. */
  load<T extends { byteLength: number }>(
    f: () => Promise<T>,
    signal?: AbortSignalLike,
  ): Promise<T> {
    return this.#loading.run(async () => {
      while (this.#held >= this.#limit)
        await new Promise<void>((resolve) => this.#waiting.push(resolve))
      signal?.throwIfAborted()
      const image = await f()
      this.#held += image.byteLength
      return image
    }, signal)
  }

  release({ byteLength }: { byteLength: number }): void {
    this.#held -= byteLength
    for (const resolve of this.#waiting.splice(0)) resolve()
  }
}

/**
 * The results of f for all items in the order of completion, at most `concurrency` calls at once. An
 * item is pulled from the iterable only when its call can start, so memory does not grow with their
 * number. An error of f ends the iteration, as does the consumer's return.
 */
export async function* mapUnordered<T, R>(
  items: Iterable<T> | AsyncIterable<T>,
  concurrency: number,
  f: (item: T, index: number) => Promise<R>,
): AsyncGenerator<R> {
  const source =
    Symbol.asyncIterator in items ? items[Symbol.asyncIterator]() : items[Symbol.iterator]()
  const running = new Map<number, Promise<{ index: number; result: R }>>()
  let next = 0
  let exhausted = false
  try {
    while (!exhausted || running.size) {
      while (!exhausted && running.size < concurrency) {
        const item = await source.next()
        if (item.done) {
          exhausted = true
          break
        }
        const index = next++
        running.set(
          index,
          f(item.value, index).then((result) => ({ index, result })),
        )
      }
      if (!running.size) break
      const { index, result } = await Promise.race(running.values())
      running.delete(index)
      yield result
    }
  } finally {
    for (const promise of running.values()) promise.catch(() => {})
    await source.return?.()
  }
}
