// Everything that is checked without running the library, one line for each: formatting and lint of
// TypeScript, the types of library and tests, formatting of C++ and CUDA, a build in which warnings are
// errors, no kernel spills and exponentials overlap products where a kernel demands it, and the
// package's manifest and types as its users resolve them.
import { spawnSync } from 'node:child_process'
import { mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { createRequire } from 'node:module'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = join(dirname(fileURLToPath(import.meta.url)), '..')
const require = createRequire(import.meta.url)
const bin = (name, path) => join(dirname(require.resolve(`${name}/package.json`)), path)

let failed = 0
function check(title, command, args) {
  const { status, error, stdout, stderr } = spawnSync(command, args, {
    cwd: root,
    encoding: 'utf8',
    maxBuffer: 1 << 28,
  })
  if (!error && status === 0) {
    console.log(`ok      ${title}`)
    return true
  }
  console.log(`FAILED  ${title}`)
  if (error?.code === 'ENOENT')
    console.log(`        ${command} is not installed, and this check needs it.`)
  else console.log(`${stdout ?? ''}${stderr ?? ''}${error ?? ''}`)
  failed++
  return false
}
const node = (title, script, ...args) => check(title, process.execPath, [script, ...args])

function checkPackage() {
  const folder = mkdtempSync(join(tmpdir(), 'p2r-check-'))
  try {
    const pack = ['pack', '--ignore-scripts', '--pack-destination', folder]
    if (!check('npm pack', 'npm', pack)) return
    const tarball = join(folder, readdirSync(folder)[0])
    node('publint', join(root, 'node_modules/publint/src/cli.js'), '--strict', tarball)
    // CommonJS requires the ES module, as every Node in `engines` can.
    const esm = ['--profile', 'esm-only', '--no-emoji', '--format', 'ascii']
    node('are the types wrong', bin('@arethetypeswrong/cli', 'dist/index.js'), ...esm, tarball)
  } finally {
    rmSync(folder, { recursive: true })
  }
}

const sources = ['ops', 'cpu', 'cuda', 'binding', 'test/twin', 'scripts'].flatMap((folder) =>
  readdirSync(join(root, folder), { recursive: true })
    .filter((name) => /\.(h|cpp|cc|cu|cuh)$/.test(name))
    .map((name) => join(folder, name)),
)

node('biome: format and lint', bin('@biomejs/biome', 'bin/biome'), 'ci', '--colors=off', '.')
check(`clang-format: ${sources.length} files`, 'clang-format', ['--dry-run', '-Werror', ...sources])
node('tsc: library, examples, benchmarks, reliability', bin('typescript', 'bin/tsc'), '--noEmit')
node('tsc: declarations of the library', bin('typescript', 'bin/tsc'), '-p', 'lib')
const built = node(
  'build: no warnings, no spills, no serialised wgmma, overlaps as demanded',
  join(root, 'scripts/build.mjs'),
  '--strict',
)
// The tests' types are those of the built package.
if (built) node('tsc: tests', bin('typescript', 'bin/tsc'), '-p', 'test')
if (built) checkPackage()
if (failed) {
  console.log(`${failed} of the checks failed.`)
  process.exit(1)
}
