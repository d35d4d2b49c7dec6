// The layers that docs/architecture.md describes: every family has its files in each of them, and
// includes and imports run one way.
import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs'
import { basename, dirname, join } from 'node:path'
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

/** Source without comments and string contents; include paths are kept. */
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
        // The kernel twin replaces the primitives here, under P2R_TWIN.
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

test('only cuda/ptx.cuh contains PTX, launches and shared memory', () => {
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

test('code compiled per instruction set contains no inline code of the standard library', () => {
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
        else
          expect(
            ['ops/tensor.h', 'ops/enums.h', 'ops/random_key.h'],
            `${path} includes ${target}`,
          ).toContain(target)
      } else {
        expect(name, path).toMatch(/^<([a-z0-9_]+\.h|cstddef|cstdint|cstring|cmath)$/)
      }
    }
    expect(code(path), path).not.toMatch(/\bstd::(?!u?int|size_t|ptrdiff_t)/)
  }
  for (const path of perSet) visit(path)
})

test('lib/models, lib/p2r and lib/vision reach the addon only through lib/ops', () => {
  for (const path of ['lib/models', 'lib/p2r', 'lib/vision'].flatMap((f) => files(f, /\.ts$/)))
    expect(read(path), path).not.toMatch(/from '.*\/native\.js'/)
})

/** The first circle of imports by value that starts from a module, as its path; undefined without one. */
function importCycle(imports: ReadonlyMap<string, readonly string[]>): string[] | undefined {
  const finished = new Set<string>()
  const visit = (path: string, above: readonly string[]): string[] | undefined => {
    const start = above.indexOf(path)
    if (start >= 0) return [...above.slice(start), path]
    if (finished.has(path)) return undefined
    for (const target of imports.get(path) ?? []) {
      const found = visit(target, [...above, path])
      if (found) return found
    }
    finished.add(path)
    return undefined
  }
  for (const path of imports.keys()) {
    const found = visit(path, [])
    if (found) return found
  }
  return undefined
}

/** The modules that a source imports or re-exports at run time. Imports of types alone are erased. */
const valueImports = (path: string, source: string): string[] =>
  [...source.matchAll(/^(?:import|export)\s+(?!type\b)[^'";]*?from '(\.[^']+)'/gm)].map(
    ([, from]) => join(dirname(path), from!.replace(/\.js$/, '.ts')),
  )

test('lib has no import cycles, types aside', () => {
  const imports = new Map(files('lib', /\.ts$/).map((p) => [p, valueImports(p, read(p))]))
  expect(imports.get('lib/index.ts')).toContain('lib/safetensors.ts')
  expect(importCycle(imports)).toBeUndefined()
})

test('an import cycle is found, through multi-line imports and re-exports, and not through types', () => {
  const importsOf = (sources: Record<string, string>) =>
    new Map(Object.entries(sources).map(([path, source]) => [path, valueImports(path, source)]))
  const outer = "import {\n  type A,\n  a,\n} from './p2r/b.js'\n"
  const cycle = ['lib/a.ts', 'lib/p2r/b.ts', 'lib/a.ts']
  expect(
    importCycle(importsOf({ 'lib/a.ts': outer, 'lib/p2r/b.ts': "export { b } from '../a.js'\n" })),
  ).toEqual(cycle)
  expect(
    importCycle(
      importsOf({ 'lib/a.ts': outer, 'lib/p2r/b.ts': "import type { B } from '../a.js'\n" }),
    ),
  ).toBeUndefined()
})

test('examples use the package by its name', () => {
  for (const path of files('examples', /\.ts$/))
    for (const [, from] of read(path).matchAll(/from '(\.\.?\/[^']+)'/g))
      expect(join(dirname(path), from!), path).toMatch(/^examples\//)
})

test('no source has TODO notes', () => {
  const all = [
    'ops',
    'cpu',
    'cuda',
    'binding',
    'lib',
    'scripts',
    'examples',
    'bench',
    'reliability',
  ].flatMap((folder) => files(folder, /\.(h|cpp|cc|cu|cuh|def|ts|mjs)$/))
  for (const path of all) expect(read(path), path).not.toMatch(/\b(TODO|FIXME|XXX|HACK)\b/)
})

const roots = [
  'ops',
  'cpu',
  'cuda',
  'binding',
  'lib',
  'scripts',
  'test',
  'bench',
  'reliability',
  'examples',
  'docs',
]
const everything = [
  ...[...roots, '.ci'].flatMap((folder) => files(folder, /./)),
  ...readdirSync(root).filter((name) => statSync(join(root, name)).isFile()),
]
const names = new Set(everything.map((path) => basename(path)))

/** The comments of a source; the whole of a document. */
function prose(path: string): string {
  const text = read(path)
  if (path.endsWith('.md')) return text
  const comment = /\.(py|txt|gyp)$|^\.ci\/run$/.test(path)
    ? /#.*$|"""[\s\S]*?"""/gm
    : /\/\*[\s\S]*?\*\/|(?<!:)\/\/.*$/gm
  return [...text.matchAll(comment)].map(([found]) => found).join('\n')
}

/** The files and folders that a text names, by path or by name alone, and that do not exist. */
function missing(text: string): string[] {
  const wildcard = String.raw`\*+|<\w+>|\$\([^)]*\)`
  const path = new RegExp(
    String.raw`(?<![\w./-])(?:${roots.join('|')})/(?:[\w/-]|\.(?=[\w*<{])|\{[\w,.-]+\}|${wildcard})*`,
    'g',
  )
  const absent = (name: string): boolean => {
    const pattern = name
      .replaceAll('.', '\\.')
      .replaceAll(new RegExp(wildcard, 'g'), '[^/]*')
      .replaceAll(/\{([^}]*)\}/g, (_, list: string) => `(${list.replaceAll(',', '|')})`)
    const exact = new RegExp(`^${pattern}(/|$)`)
    return !everything.some((existing) => exact.test(existing))
  }
  // llama.cpp is a project.
  const alone = /(?<![\w./*>-])(?!llama\.cpp)[\w-]+\.(?:h|cpp|cc|cu|cuh|def|ts|mjs)\b/g
  return [
    ...[...text.matchAll(path)].map(([name]) => name.replace(/\/$/, '')).filter(absent),
    ...[...text.matchAll(alone)].map(([name]) => name).filter((name) => !names.has(name)),
  ]
}

test('every file that a comment or a document names exists', () => {
  const wrong = ['cuda/nothing.cpp', 'ops/<op>/nothing.h', 'docs/{a,b}.md', 'nothing.h']
  const right = [
    'ops/ops.def',
    'ops/<family>.h',
    'docs/{rewards,serving}.md',
    'cpu/simd/',
    'rows.h',
  ]
  expect(missing([...right, ...wrong].join(', '))).toEqual(wrong)
  const texts = everything.filter((path) =>
    /\.(h|cpp|cc|cu|cuh|def|ts|mjs|py|md|txt|gyp)$|^\.ci\/run$/.test(path),
  )
  for (const path of texts) expect(missing(prose(path)), path).toEqual([])
})

test('every link of a document leads to a file', () => {
  for (const path of everything.filter((name) => name.endsWith('.md')))
    for (const [, link] of read(path).matchAll(/\]\(([^):#\s]+)(?:#[^)]*)?\)/g))
      expect(existsSync(join(root, dirname(path), link!)), `${path}: ${link}`).toBe(true)
})
