// Builds the addon from source, in a checkout and in an installed package (`npx p2r-kernels build`): by
// CMake, or where there is none by make, which knows no CUDA.
//
//   node scripts/addon.mjs [--cuda=auto|on|off] [--strict]
import { spawnSync } from 'node:child_process'
import { existsSync, readdirSync, readFileSync, realpathSync, rmSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { dirname, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'

export const root = join(dirname(fileURLToPath(import.meta.url)), '..')

export function fail(message) {
  console.error(`build: ${message}`)
  process.exit(1)
}

export const found = (command) =>
  spawnSync(command, ['--version'], { stdio: 'ignore' }).status === 0

export function run(command, args, message) {
  const { status, error } = spawnSync(command, args, { cwd: root, stdio: 'inherit' })
  if (error || status !== 0) fail(error?.code === 'ENOENT' ? `${command} was not found` : message)
}

/** What the command line says of the addon. */
export function addonOptions(args) {
  const options = { cuda: 'auto', strict: false }
  for (const arg of args) {
    if (arg === '--strict') options.strict = true
    else if (/^--cuda=(auto|on|off)$/.test(arg)) options.cuda = arg.slice(7)
    else fail(`unknown option ${arg}; expected --cuda=auto|on|off or --strict`)
  }
  return options
}

/**
 * Removes build folders that were configured elsewhere: CMake refuses a checkout that was moved or
 * copied with its build folder.
 */
function removeForeign(folder) {
  if (!existsSync(folder)) return
  const cache = join(folder, 'CMakeCache.txt')
  if (existsSync(cache)) {
    const [, home] = readFileSync(cache, 'utf8').match(/^CMAKE_CACHEFILE_DIR:\w+=(.*)$/m) ?? []
    if (!home || !existsSync(home) || realpathSync(home) !== realpathSync(folder)) {
      console.log(`build: ${folder} was made in another place, so it starts anew.`)
      rmSync(folder, { recursive: true })
      return
    }
  }
  for (const entry of readdirSync(folder, { withFileTypes: true }))
    if (entry.isDirectory() && !/^(CMakeFiles|Release)$/.test(entry.name))
      removeForeign(join(folder, entry.name))
}

/** Configures a build folder of CMake, below the root; `defines` are CMake's. */
export function configure({ folder = 'build', cuda = 'auto', strict = false, defines = {} }) {
  removeForeign(join(root, 'build'))
  const all = {
    CMAKE_BUILD_TYPE: 'Release',
    WITH_CUDA: cuda.toUpperCase(),
    STRICT: strict ? 'ON' : 'OFF',
    NODE: process.execPath,
    ...defines,
  }
  const fresh = !existsSync(join(root, folder, 'CMakeCache.txt'))
  run(
    'cmake',
    [
      ...['-S', '.', '-B', folder],
      ...(fresh ? generator() : []),
      ...Object.entries(all).map(([name, value]) => `-D${name}=${value}`),
    ],
    'CMake could not configure the addon; the messages above say why',
  )
}

/** Builds targets of a configured folder, all of them unless given. */
export function make(folder, ...targets) {
  run(
    'cmake',
    [
      ...['--build', folder, '--config', 'Release'],
      ...['--parallel', String(availableParallelism())],
      ...(targets.length ? ['--target', ...targets] : []),
    ],
    'the addon could not be built; the messages above say why',
  )
}

function generator() {
  // The kernels are written with the vector types of GCC and Clang, which Visual Studio has as ClangCL.
  if (process.platform === 'win32') return ['-T', 'ClangCL']
  return found('ninja') ? ['-G', 'Ninja'] : []
}

/** Builds build/Release/p2r_kernels.node. */
export function buildAddon(options) {
  if (found('cmake')) {
    configure(options)
    make('build')
    const cache = readFileSync(join(root, 'build/CMakeCache.txt'), 'utf8')
    if (options.cuda === 'auto' && !/^CMAKE_CUDA_COMPILER:[A-Z]+=\//m.test(cache))
      console.log('build: no nvcc here, so the addon is for the CPU alone.')
    return
  }
  if (options.cuda === 'on') fail('--cuda=on needs CMake and nvcc')
  if (!found('make')) fail('a C++20 compiler and CMake or make are needed, and neither is here')
  console.log('build: no CMake here, so make builds an addon for the CPU alone.')
  run(
    'make',
    [`-j${availableParallelism()}`, `NODE=${process.execPath}`],
    'the addon could not be built; a C++20 compiler is needed',
  )
}

if (resolve(process.argv[1] ?? '') === fileURLToPath(import.meta.url)) {
  buildAddon(addonOptions(process.argv.slice(2)))
  console.log(`build: made ${join(root, 'build/Release/p2r_kernels.node')}`)
}
