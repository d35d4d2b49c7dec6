// Makes prebuilds/<platform>/p2r_kernels.node, which travel in the package, where they are missing or out
// of date. They run on every Linux that Node runs on (glibc.mjs); that is checked here.
//
//   node scripts/prebuild.mjs [--base] [linux-x64|linux-arm64]
//
// linux-x64 has the CPU and CUDA backends, the latter for every GPU since sm_80. With --base, for
// tests, it is what `npm run compile` made, which may be without CUDA. linux-arm64
// has the CPU backend and is cross-compiled elsewhere.
import { copyFileSync, mkdirSync } from 'node:fs'
import { dirname, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { configure, fail, found, make, root } from './addon.mjs'
import { oldestGlibc, symbolsOf, tooNew } from './glibc.mjs'
import { addonKey, upToDate } from './up_to_date.mjs'

const crossCompiler = 'aarch64-linux-gnu-g++'
export const platforms = ['linux-x64', 'linux-arm64']

const productOf = (platform) => join('prebuilds', platform, 'p2r_kernels.node')

/** Why the prebuild cannot be made here, or nothing. */
export function prebuildProblem(platform) {
  if (process.platform !== 'linux') return `${process.platform} makes no prebuilds`
  if (!found('cmake')) return 'it needs CMake'
  if (platform === `linux-${process.arch}`) return undefined
  if (platform !== 'linux-arm64') return `${process.arch} makes no prebuild of ${platform}`
  return found(crossCompiler)
    ? undefined
    : `it needs ${crossCompiler} (Debian: g++-aarch64-linux-gnu)`
}

/** The folder that a prebuild is built in. */
export const folderOf = (platform, base = false) =>
  base && platform === `linux-${process.arch}` ? 'build' : `build/${platform}`

function configureCross() {
  configure({
    folder: folderOf('linux-arm64'),
    cuda: 'off',
    defines: {
      CMAKE_SYSTEM_NAME: 'Linux',
      CMAKE_SYSTEM_PROCESSOR: 'aarch64',
      CMAKE_CXX_COMPILER: crossCompiler,
    },
  })
}

/** Makes what runs recorded cases on the CPU backend of linux-arm64: cpu_runner in its folder. */
export function makeCpuRunner() {
  configureCross()
  make(folderOf('linux-arm64'), 'cpu_runner')
}

function build(platform, base) {
  const folder = folderOf(platform, base)
  if (platform !== `linux-${process.arch}`) configureCross()
  else if (!base)
    configure({
      folder,
      cuda: platform === 'linux-x64' ? 'on' : 'off',
    })
  make(folder, 'prebuild')
  const made = join(root, folder, 'prebuild/p2r_kernels.node')
  const newer = tooNew(symbolsOf(made))
  if (newer.length)
    fail(
      `${platform} needs more than glibc ${oldestGlibc} has: ` +
        newer.map(({ name, version }) => `${name} ${version || 'of no library'}`).join(', '),
    )
  const product = join(root, productOf(platform))
  mkdirSync(dirname(product), { recursive: true })
  copyFileSync(made, product)
}

/**
 * Makes the prebuild unless it is there; one with CUDA is as good as a base one.
 * A base one holds what `npm run compile` compiled, which is up to date.
 */
export function prebuild(platform, { base = false } = {}) {
  const key = (kind) => addonKey('prebuild', platform, kind, root)
  return upToDate(
    `prebuild-${platform}`,
    (base ? ['base', 'full'] : ['full']).map(key),
    [productOf(platform)],
    () => build(platform, base),
  )
}

if (resolve(process.argv[1] ?? '') === fileURLToPath(import.meta.url)) {
  const args = process.argv.slice(2)
  const base = args.includes('--base')
  const wanted = args.filter((arg) => arg !== '--base')
  for (const arg of wanted)
    if (!platforms.includes(arg))
      fail(`unknown argument ${arg}; expected --base or one of ${platforms.join(', ')}`)
  for (const platform of wanted.length ? wanted : platforms) {
    const problem = prebuildProblem(platform)
    if (problem) fail(`${platform} cannot be made here: ${problem}`)
    await prebuild(platform, { base })
  }
}
