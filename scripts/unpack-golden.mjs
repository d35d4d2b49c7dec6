// Reads one of the files that scripts/pack-golden.mjs wrote.
import { readFileSync } from 'node:fs'
import { brotliDecompressSync } from 'node:zlib'

/**
 * A family's files: where each one's bytes are, by path.
 * @param {string} family
 * @returns {{ index: Record<string, [number, number]>, bytes: (path: string) => Buffer }}
 */
export function unpackGolden(family) {
  const packed = readFileSync(new URL(`../test/golden/${family}.br`, import.meta.url))
  const all = brotliDecompressSync(packed)
  const start = 4 + all.readUInt32LE(0)
  /** @type {Record<string, [number, number]>} */
  const index = JSON.parse(all.toString('utf8', 4, start))
  return {
    index,
    bytes(path) {
      const entry = Object.hasOwn(index, path) ? index[path] : undefined
      if (!entry) throw new Error(`test/golden/${family}.br has no ${path}`)
      const at = start + entry[0]
      if (at + entry[1] > all.length)
        throw new Error(`test/golden/${family}.br ends before ${path}`)
      return all.subarray(at, at + entry[1])
    },
  }
}
