// The docstrings of what the package exports: each function and class has one example, which runs as it stands in
// the declarations, and each field of an interface is documented.
import { spawn } from 'node:child_process'
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { basename, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import * as library from 'p2r-kernels'
import { afterAll, describe, expect, test } from 'vitest'

const root = fileURLToPath(new URL('..', import.meta.url))
// Within the package, so that the examples find it by its name.
const folder = join(root, 'build', 'examples')
mkdirSync(folder, { recursive: true })
afterAll(() => rmSync(folder, { recursive: true }))

const files = ['.', 'ops', 'p2r', 'vision'].flatMap((part) => {
  const path = join(root, 'dist', 'lib', part)
  return readdirSync(path)
    .filter((name) => name.endsWith('.d.ts'))
    .map((name) => join(path, name))
})

const named = new Set(
  [
    ...readFileSync(join(root, 'dist', 'lib', 'index.d.ts'), 'utf8').matchAll(
      /export (?:type )?\{([^}]*)\}/g,
    ),
  ].flatMap(([, names]) => names!.split(',').map((name) => name.replace('type ', '').trim())),
)

interface Documented {
  name: string
  file: string
  examples: string[]
}

/** The functions, classes and constants that a file declares, with the examples in the comment before each. */
function documented(file: string): Documented[] {
  const text = readFileSync(file, 'utf8')
  const declaration =
    /(\/\*\*(?:(?!\*\/)[\s\S])*\*\/\n)?export (?:declare )?(?:function|class|const) (\w+)/g
  const found = new Map<string, Documented>()
  for (const [, comment = '', name] of text.matchAll(declaration)) {
    const lines = comment.split('\n').map((line) => line.replace(/^\s*(?:\/\*\*|\*\/|\* ?)/, ''))
    const examples = lines
      .join('\n')
      .split(/^@example$/m)
      .slice(1)
    // A function's overloads share the comment of the first.
    const known = found.get(name!)
    if (known) known.examples.push(...examples)
    else found.set(name!, { name: name!, file, examples })
  }
  return [...found.values()]
}

const exported = files.flatMap(documented).filter(({ name }) => name in library)

function run(path: string): Promise<{ status: number | null; output: string }> {
  return new Promise((resolve) => {
    const child = spawn(process.execPath, [path], { cwd: folder })
    let output = ''
    for (const stream of [child.stdout, child.stderr])
      stream.on('data', (chunk) => {
        output += chunk
      })
    child.on('close', (status) => resolve({ status, output }))
  })
}

/** What an example says that it prints: the comments after its calls of console.log. */
function promised(example: string): string[] {
  return [...example.matchAll(/^\s*console\.log\(.*\) \/\/ (.*)$/gm)].map(([, text]) => text!)
}

test('the declarations were found', () => {
  expect(exported.length).toBeGreaterThan(20)
})

describe.each(exported)('$name', ({ name, file, examples }) => {
  test('has one example, which prints what it says', async () => {
    expect(examples).toHaveLength(1)
    const [example] = examples
    // Node 20 has no `using`.
    expect(example).not.toMatch(/\busing\b/)
    const path = join(folder, `${basename(file, '.d.ts')}-${name}.mjs`)
    writeFileSync(path, example!.replace(/^```(?:js)?$/gm, ''))
    const { status, output } = await run(path)
    expect(status, output).toBe(0)
    const lines = output.trimEnd().split('\n')
    for (const [i, text] of promised(example!).entries()) {
      // 'negative where ...' and 'about 0.3' are prose; a value is what Node prints.
      if (/^(?:negative|as|about) /.test(text)) continue
      expect(lines.slice(i).join('\n')).toContain(text)
    }
  })
})

test.each(files.map((file) => [basename(file), file]))(
  '%s: every field is documented',
  (_, file) => {
    const bare: string[] = []
    let open = ''
    let before = ''
    for (const line of readFileSync(file, 'utf8').split('\n')) {
      const [, interfaceName] = /^export interface (\w+)/.exec(line) ?? []
      if (interfaceName && named.has(interfaceName)) {
        open = interfaceName
        if (!before.endsWith('*/')) bare.push(open)
      }
      const [, field] = /^ {4}(?:readonly )?(\w+)\??[:(<]/.exec(line) ?? []
      if (open && field && !before.endsWith('*/') && !/: never;/.test(line))
        bare.push(`${open}.${field}`)
      if (line === '}') open = ''
      before = line
    }
    expect(bare).toEqual([])
  },
)
