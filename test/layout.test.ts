// The layers that docs/architecture.md describes: every family has its place in each of them, and
// includes run one way.
import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'

const root = fileURLToPath(new URL('..', import.meta.url))
const read = (path: string): string => readFileSync(join(root, path), 'utf8')
const files = (folder: string, pattern: RegExp): string[] =>
  existsSync(join(root, folder))
    ? readdirSync(join(root, folder), { recursive: true, encoding: 'utf8' })
        .map((name) => `${folder}/${name}`)
        .filter((path) => pattern.test(path) && !path.includes('/node_modules/'))
        .filter((path) => statSync(join(root, path)).isFile())
    : []
const cpp = /\.(h|cpp|cc|cu|cuh|def)$/

/** Source without comments and without what stands in strings, but for include paths. */
const code = (path: string): string =>
  read(path)
    .replaceAll(/\/\*[\s\S]*?\*\//g, '')
    .replaceAll(/\/\/.*$/gm, '')
    .replaceAll(/^(?!\s*#).*$/gm, (line) => line.replaceAll(/"(?:[^"\\]|\\.)*"/g, '""'))

const includes = (path: string): string[] =>
  [...code(path).matchAll(/^\s*#\s*include\s*(["<][^">]+)[">]/gm)].map(([, name]) => name!)

const lines = [...read('ops/ops.def').matchAll(/^OP\((\w+), (\w+), (\w+)\)/gm)]
const families = [...new Set(lines.map(([, family]) => family!))]

// `cast` belongs to the core: lib/tensor.ts calls it, test/tensor.test.ts tests it.
const coreFamilies = new Set(['cast'])

test.each(families)('%s has its files in every layer', (family) => {
  const either = (...paths: string[]) =>
    expect(
      paths.some((path) => existsSync(join(root, path))),
      `none of ${paths.join(', ')}`,
    ).toBe(true)
  either(`ops/${family}.h`)
  either(`cpu/${family}.cpp`, `cpu/${family}`)
  either(`cuda/${family}.cu`, `cuda/${family}`)
  either(`binding/${family}.cc`)
  if (coreFamilies.has(family)) return
  either(`lib/ops/${family}.ts`)
  either(`test/${family}.test.ts`)
})

test('an operation is listed once, and named by its family’s header', () => {
  const functions = lines.map(([, , name]) => name)
  expect(new Set(functions).size).toBe(functions.length)
  for (const [, family, , args] of lines)
    expect(code(`ops/${family}.h`), `${args} in ops/${family}.h`).toMatch(
      new RegExp(`struct ${args}\\b`),
    )
})

const layers: [string, string[]][] = [
  ['ops', ['ops']],
  ['cpu', ['ops', 'cpu']],
  ['cuda', ['ops', 'cuda']],
  ['binding', ['ops', 'binding']],
]
test.each(layers)('%s includes only from %j', (layer, allowed) => {
  for (const path of files(layer, cpp))
    for (const name of includes(path)) {
      if (name.startsWith('"')) {
        const target = name.slice(1)
        // The one place where kernels meet the twin, under P2R_TWIN.
        if (path === 'cuda/ptx.cuh' && target === 'test/twin/simt.h') continue
        expect(existsSync(join(root, target)), `${path}: paths start at the root: ${target}`).toBe(
          true,
        )
        expect(allowed, `${path} includes ${target}`).toContain(target.split('/')[0])
      } else {
        if (layer !== 'binding') expect(name, path).not.toMatch(/napi|node_api|v8|uv\.h/)
        if (layer !== 'cuda') expect(name, path).not.toMatch(/cuda|cub\/|thrust|cooperative/)
      }
    }
})

test('PTX, launches and shared memory stand in cuda/ptx.cuh alone', () => {
  for (const path of files('cuda', cpp)) {
    if (path === 'cuda/ptx.cuh') continue
    const text = code(path)
    expect(text, path).not.toMatch(/\basm\b/)
    expect(text, path).not.toMatch(/<<</)
    expect(text, path).not.toMatch(/\b__shared__\b/)
    expect(text, path).not.toMatch(/\b__(expf|logf|exp10f|log2f|powf|sinf|cosf|tanf)\b/)
    expect(text, path).not.toMatch(/\batomicAdd\(\s*(\(float|static_cast<float)/)
  }
})

test('what is compiled per instruction set holds no inline code of the standard library', () => {
  const perSet = files('cpu/simd', /\.(cpp|h)$/).filter((p) => p !== 'cpu/simd/select.cpp')
  expect(perSet.length).toBeGreaterThan(2)
  const seen = new Set<string>()
  const visit = (path: string): void => {
    if (seen.has(path)) return
    seen.add(path)
    for (const name of includes(path)) {
      if (name.startsWith('"')) {
        const target = name.slice(1)
        if (target.startsWith('cpu/simd/')) visit(target)
        else expect(['ops/tensor.h'], `${path} includes ${target}`).toContain(target)
      } else {
        expect(name, path).toMatch(/^<([a-z0-9_]+\.h|cstddef|cstdint|cstring|cmath)$/)
      }
    }
    expect(code(path), path).not.toMatch(/\bstd::(?!u?int|size_t|ptrdiff_t)/)
  }
  for (const path of perSet) visit(path)
})

test('lib/p2r and lib/vision stand on lib/ops, not on the addon', () => {
  for (const path of [...files('lib/p2r', /\.ts$/), ...files('lib/vision', /\.ts$/)])
    expect(read(path), path).not.toMatch(/from '.*\/native\.js'/)
})

test('examples use the package by its name', () => {
  for (const path of files('examples', /\.ts$/))
    for (const [, from] of read(path).matchAll(/from '(\.\.?\/[^']+)'/g))
      expect(join(dirname(path), from!), path).toMatch(/^examples\//)
})

test('no file of the house leaves notes to self', () => {
  const all = ['ops', 'cpu', 'cuda', 'binding', 'lib', 'scripts', 'examples', 'bench'].flatMap(
    (folder) => files(folder, /\.(h|cpp|cc|cu|cuh|def|ts|mjs)$/),
  )
  for (const path of all) expect(read(path), path).not.toMatch(/\b(TODO|FIXME|XXX|HACK)\b/)
})
