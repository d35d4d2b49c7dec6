// Builds what is missing or out of date: the addon (cmake-js, or node-gyp where there is no CMake),
// then the TypeScript. What is out of date is told by content, not by time.
//
//   node scripts/build.mjs [--cuda=auto|on|off] [--strict]
import { spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  realpathSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { createRequire } from 'node:module'
import { availableParallelism } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = join(dirname(fileURLToPath(import.meta.url)), '..')
const require = createRequire(import.meta.url)

const options = { cuda: 'auto', strict: false }
for (const arg of process.argv.slice(2)) {
  if (arg === '--strict') options.strict = true
  else if (/^--cuda=(auto|on|off)$/.test(arg)) options.cuda = arg.slice(7)
  else fail(`unknown option ${arg}; expected --cuda=auto|on|off or --strict`)
}

function fail(message) {
  console.error(`build: ${message}`)
  process.exit(1)
}

/** The files under the folders whose names match, with a hash over their names and contents. */
function digest(folders, pattern, ...salt) {
  const hash = createHash('sha256').update(JSON.stringify(salt))
  for (const folder of folders) {
    const path = join(root, folder)
    if (!existsSync(path)) continue
    const names = pattern.test(folder) ? [''] : readdirSync(path, { recursive: true }).sort()
    for (const name of names)
      if (name === '' || pattern.test(name))
        hash.update(`${folder}/${name}\0`).update(readFileSync(join(path, name)))
  }
  return hash.digest('hex')
}

/** Runs step unless the stamp says that it was done for the inputs of `key`, or of `as`, which is as good. */
function upToDate(stamp, key, products, step, as = key) {
  const file = join(root, 'build', `${stamp}.stamp`)
  const done = existsSync(file) && [key, as].includes(readFileSync(file, 'utf8'))
  if (done && products.every((p) => existsSync(join(root, p)))) return
  rmSync(file, { force: true })
  step()
  mkdirSync(dirname(file), { recursive: true })
  writeFileSync(file, key)
}

function run(command, args, message) {
  const { status, error } = spawnSync(command, args, { cwd: root, stdio: 'inherit' })
  if (error || status !== 0) fail(message)
}
const found = (command) => spawnSync(command, ['--version'], { stdio: 'ignore' }).status === 0
const bin = (name, path) => join(dirname(require.resolve(`${name}/package.json`)), path)

function buildAddon() {
  const jobs = String(availableParallelism())
  if (found('cmake')) {
    for (const step of ['configure', 'build'])
      run(
        process.execPath,
        [
          bin('cmake-js', 'bin/cmake-js'),
          step,
          `--parallel=${jobs}`,
          `--CDWITH_CUDA=${options.cuda.toUpperCase()}`,
          `--CDSTRICT=${options.strict ? 'ON' : 'OFF'}`,
        ],
        'the addon could not be built; the messages above say why',
      )
    const cache = readFileSync(join(root, 'build/CMakeCache.txt'), 'utf8')
    if (!/^CMAKE_CUDA_COMPILER:[A-Z]+=\//m.test(cache) || options.cuda === 'off')
      console.log('build: the addon is CPU-only (no nvcc).')
  } else {
    if (options.cuda === 'on') fail('--cuda=on needs CMake and nvcc')
    console.log('build: no CMake here, so node-gyp builds a CPU-only addon.')
    // Node's own headers, where they lie beside it, instead of a download.
    const home = dirname(dirname(realpathSync(process.execPath)))
    const local = existsSync(join(home, 'include/node/node_api.h')) ? [`--nodedir=${home}`] : []
    run(
      process.execPath,
      [bin('node-gyp', 'bin/node-gyp.js'), 'rebuild', `--jobs=${jobs}`, ...local],
      'the addon could not be built; a C++20 compiler and make are needed',
    )
  }
}

const sources = ['ops', 'cpu', 'cuda', 'binding', 'test/twin', 'CMakeLists.txt', 'binding.gyp']
const cpp = /(\.(h|cpp|cc|cu|cuh|def|gyp)|CMakeLists\.txt)$/
const addonKey = (given) => digest(sources, cpp, given, process.arch, process.version, root)
upToDate(
  'addon',
  addonKey(options),
  ['build/Release/p2r_kernels.node'],
  buildAddon,
  addonKey({ ...options, strict: true }),
)

const scripts = ['lib', 'examples', 'bench', 'tsconfig.json', 'package-lock.json']
upToDate(
  'typescript',
  digest(scripts, /(\.ts|\.json)$/, root),
  ['dist/lib/index.js', 'dist/lib/index.d.ts'],
  () => {
    rmSync(join(root, 'dist'), { recursive: true, force: true })
    run(process.execPath, [bin('typescript', 'bin/tsc')], 'the TypeScript does not compile')
  },
)
