import { createHash } from 'node:crypto'
import { expect, test } from 'vitest'
import { type Family, golden, grpoCases } from './golden.js'

const families: [Family, number][] = [
  ['attention', 96],
  ['grpo', 108],
  ['hopper', 4],
  ['image', 58],
  ['lm_ops', 187],
  ['qwen3vl', 292],
  ['rope', 66],
  ['tower', 125],
]

test.each(families)('%s has the files of its index', (family, count) => {
  const files = golden(family)
  const paths = files.list()
  expect(paths).toEqual(paths.toSorted())
  expect(paths).toHaveLength(count)
  for (const path of paths) {
    expect(path.startsWith(`${family}/`)).toBe(true)
    const bytes = files.bytes(path)
    if (path.endsWith('.json')) expect(files.json(path)).toBeTypeOf('object')
    else expect(bytes.length, path).toBeGreaterThan(0)
  }
  expect(() => files.bytes(`${family}/absent.bin`)).toThrow(/has no/)
})

test.each(['attention', 'lm_ops', 'rope'] as const)(
  '%s: every tensor has the size of its shape',
  (family) => {
    const files = golden(family)
    for (const path of files.list().filter((p) => p.endsWith('/meta.json'))) {
      const folder = path.slice(0, -'meta.json'.length)
      const { tensors } = files.json<{ tensors: Record<string, { shape: number[] }> }>(path)
      expect(Object.keys(tensors).length).toBeGreaterThan(0)
      for (const [name, { shape }] of Object.entries(tensors))
        expect(files.bytes(`${folder}${name}.bin`).length, name).toBe(
          4 * shape.reduce((n, d) => n * d, 1),
        )
    }
  },
)

test('image: every file has the hash that its description gives', () => {
  const files = golden('image')
  let hashed = 0
  const visit = (value: unknown): void => {
    if (typeof value !== 'object' || value === null) return
    const { file, sha256 } = value as { file?: string; sha256?: string }
    if (file && sha256) {
      const digest = createHash('sha256')
        .update(files.bytes(`image/${file}`))
        .digest('hex')
      expect(digest, file).toBe(sha256)
      hashed++
    }
    for (const inner of Object.values(value)) visit(inner)
  }
  visit(files.json('image/meta.json'))
  expect(hashed).toBeGreaterThan(40)
})

test('grpo: every tensor of every case can be read, scalars are numbers', () => {
  const { cases } = golden('grpo').json<{ cases: Record<string, Record<string, object>>[] }>(
    'grpo/meta.json',
  )
  expect(cases).toHaveLength(107)
  grpoCases().forEach((c, i) => {
    for (const side of ['inputs', 'outputs'] as const)
      for (const name of Object.keys(cases[i]![side] ?? {})) {
        const t = side === 'inputs' ? c.input(name) : c.output(name)
        const size = t.shape.reduce((n, d) => n * d, 1)
        expect(t.data.length, `${c.group}.${c.id} ${name}`).toBe(size)
        expect(t.values.length).toBe(size)
        expect(c.has(name)).toBe(true)
      }
    for (const [name, given] of Object.entries(cases[i]!.scalars ?? {}))
      expect(c.scalars[name]).toSatisfy(
        (v: number) => typeof v === 'number' && (!Number.isNaN(v) || (given as unknown) === 'NaN'),
      )
    if ('rows_file' in cases[i]!) expect(c.rows().length).toBeGreaterThan(0)
    else expect(c.has('absent')).toBe(false)
  })
  expect(() => grpoCases('logprob')[0]!.input('absent')).toThrow(/has no absent/)
})
