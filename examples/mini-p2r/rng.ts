/**
 * Seeded random numbers: sfc32, the 32-bit "small fast counting" generator of Chris Doty-Humphrey's
 * PractRand (https://pracrand.sourceforge.net, public domain). One 32-bit counter is part of its
 * state, so no seed has a period under 2^32.
 */
export class Rng {
  #a: number
  #b: number
  #c: number
  #counter = 1

  /** Generators of the same key are equal; different keys give unrelated streams. */
  constructor(...key: readonly number[]) {
    // FNV-1a (Fowler, Noll, Vo) over the key's 32-bit words, to spread small seeds over the state.
    let hash = 0x811c9dc5
    for (const word of key) {
      for (let shift = 0; shift < 32; shift += 8) {
        hash = Math.imul(hash ^ ((word >>> shift) & 0xff), 0x01000193)
      }
    }
    this.#a = hash
    this.#b = key[0] ?? 0
    this.#c = key.length
    // PractRand's own seeding discards this many outputs to mix the state.
    for (let i = 0; i < 15; i++) this.uint32()
  }

  uint32(): number {
    const out = (this.#a + this.#b + this.#counter) | 0
    this.#counter = (this.#counter + 1) | 0
    this.#a = this.#b ^ (this.#b >>> 9)
    this.#b = (this.#c + (this.#c << 3)) | 0
    this.#c = (((this.#c << 21) | (this.#c >>> 11)) + out) | 0
    return out >>> 0
  }

  /** Uniform in [0, 1). */
  unit(): number {
    return this.uint32() / 0x100000000
  }

  /** Uniform in [low, high). */
  between(low: number, high: number): number {
    return low + (high - low) * this.unit()
  }

  /** An integer in [0, n); the bias of the multiplication is under n / 2^32. */
  below(n: number): number {
    return Math.floor(this.unit() * n)
  }

  /** Standard normal (Box and Muller 1958). */
  normal(): number {
    const radius = Math.sqrt(-2 * Math.log(1 - this.unit()))
    return radius * Math.cos(2 * Math.PI * this.unit())
  }

  /** Fisher-Yates, in place. */
  shuffle(values: Int32Array): Int32Array {
    for (let i = values.length - 1; i > 0; i--) {
      const j = this.below(i + 1)
      const kept = values[i] as number
      values[i] = values[j] as number
      values[j] = kept
    }
    return values
  }
}
