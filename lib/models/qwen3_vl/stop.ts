/** A text that comes piece by piece, up to the first of some stop texts. */
export class StopTexts {
  readonly #stop: readonly string[]
  #held = ''
  #stopped = false

  constructor(stop: readonly string[]) {
    this.#stop = stop
  }

  /** Whether a stop text has come. */
  get stopped(): boolean {
    return this.#stopped
  }

  /** What can be shown: the text so far, less what may be the beginning of a stop text. */
  push(text: string): string {
    if (this.#stopped) return ''
    this.#held += text
    const ends = this.#stop.map((stop) => this.#held.indexOf(stop)).filter((at) => at >= 0)
    if (ends.length) {
      this.#stopped = true
      return this.#take(Math.min(...ends))
    }
    let keep = 0
    for (const stop of this.#stop)
      for (let length = Math.min(stop.length - 1, this.#held.length); length > keep; length--)
        if (this.#held.endsWith(stop.slice(0, length))) keep = length
    return this.#take(this.#held.length - keep)
  }

  /** The rest of a text that ends without a stop text. */
  end(): string {
    return this.#stopped ? '' : this.#take(this.#held.length)
  }

  #take(length: number): string {
    const text = this.#held.slice(0, length)
    this.#held = this.#held.slice(length)
    return text
  }
}
