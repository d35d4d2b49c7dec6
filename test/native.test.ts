// Which addon is loaded, and what is said where there is none. Copies of the package, each in a process
// of its own.
import { spawnSync } from 'node:child_process'
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { cudaStatus } from 'p2r-kernels'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { found } from '../scripts/addon.mjs'

const root = fileURLToPath(new URL('..', import.meta.url))
const addon = join(root, 'build/Release/p2r_kernels.node')
const platform = `${process.platform}-${process.arch}`
let folder: string

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'p2r-native-'))
  cpSync(join(root, 'dist/lib'), join(folder, 'dist/lib'), { recursive: true })
  cpSync(join(root, 'package.json'), join(folder, 'package.json'))
  symlinkSync(join(root, 'node_modules'), join(folder, 'node_modules'))
})
afterEach(() => rmSync(folder, { recursive: true }))

/** Puts the addon, or what is none, into the copy. */
function put(path: string, content?: string): void {
  const at = join(folder, path)
  mkdirSync(join(at, '..'), { recursive: true })
  if (content === undefined) cpSync(addon, at)
  else writeFileSync(at, content)
}
const local = 'build/Release/p2r_kernels.node'
const prebuild = `prebuilds/${platform}/p2r_kernels.node`

/** 'cpu', or the error's code and message. */
function opened(env: Record<string, string> = {}, before = ''): string {
  const code = `${before}
    const p2r = await import(${JSON.stringify(`file://${folder}/dist/lib/index.js`)})
    try { console.log(p2r.openDevice('cpu').info.id) }
    catch (e) { console.log(e instanceof p2r.P2RError, e.code + ': ' + e.message) }`
  const { stdout, stderr } = spawnSync(process.execPath, ['--input-type=module', '-e', code], {
    cwd: folder,
    encoding: 'utf8',
    env: { ...process.env, P2R_ADDON: '', ...env },
  })
  return stdout.trim() || stderr
}

test('what was built here comes before the prebuild', () => {
  put(prebuild, 'no addon')
  put(local)
  expect(opened()).toBe('cpu')
})

test('the prebuild serves where nothing was built', () => {
  put(prebuild)
  expect(opened()).toBe('cpu')
})

test('P2R_ADDON comes before both, and is relative to the working directory', () => {
  put(prebuild, 'no addon')
  put(local, 'no addon')
  put('elsewhere/mine.node')
  expect(opened({ P2R_ADDON: 'elsewhere/mine.node' })).toBe('cpu')
  expect(opened({ P2R_ADDON: 'elsewhere/no.node' })).toMatch(/^true ERR_NATIVE: .*no\.node/s)
})

test('one that is there and broken is an error, not a reason for the next', () => {
  put(prebuild)
  put(local, 'no addon')
  const said = opened()
  expect(said).toMatch(/^true ERR_NATIVE: p2r-kernels could not load its native addon on /)
  expect(said).toMatch(/p2r_kernels\.node.*\n.*npx p2r-kernels build/s)
})

test.each([
  ['as this machine is', '', platform],
  ['macOS', `Object.defineProperty(process, 'platform', { value: 'darwin' })`, 'darwin'],
  ['musl', 'process.report.getReport = () => ({ header: {} })', `${platform} with musl`],
  [
    'an older glibc',
    `process.report.getReport = () => ({ header: { glibcVersionRuntime: '2.17' } })`,
    `${platform} with glibc 2.17`,
  ],
])('without one the error names the platform and the ways out: %s', (_, before, name) => {
  const said = opened({}, before)
  expect(said).toContain(`ERR_NATIVE: p2r-kernels has no native addon for ${name}`)
  expect(said).toContain('Prebuilt are linux-x64 and linux-arm64, for glibc 2.28 or later.')
  expect(said).toContain('npx p2r-kernels build')
  expect(said.split('\n').length).toBeLessThan(5)
})

const { built, available } = cudaStatus()
const driverless = !built
  ? 'the addon is built without CUDA'
  : available
    ? 'there is a driver'
    : found('c++')
      ? undefined
      : 'needs c++'
test.skipIf(driverless)(
  `a driver that is missing or too old is a reason, with both versions${driverless ? ` (skipped: ${driverless})` : ''}`,
  () => {
    put(prebuild)
    const reason = `const { cudaStatus } = await import(${JSON.stringify(`file://${folder}/dist/lib/index.js`)})
      console.log(JSON.stringify(cudaStatus()))`
    const status = (drivers: string) =>
      JSON.parse(
        spawnSync(process.execPath, ['--input-type=module', '-e', reason], {
          encoding: 'utf8',
          env: { ...process.env, P2R_ADDON: '', LD_LIBRARY_PATH: drivers },
        }).stdout,
      )
    const usable = { built: true, available: false }
    expect(status(folder)).toMatchObject(usable)
    expect(status(folder).reason).toMatch(
      /^CUDA 13\.\d+ is built in, but no NVIDIA driver was found\.$/,
    )
    // What the runtime first asks of a driver.
    writeFileSync(
      join(folder, 'driver.cpp'),
      'extern "C" { int cuDriverGetVersion(int* v) { return *v = 12040, 0; } int cuInit(unsigned) { return 0; } }',
    )
    const library = join(folder, 'libcuda.so.1')
    spawnSync('c++', ['-shared', '-fPIC', '-o', library, join(folder, 'driver.cpp')])
    expect(existsSync(library)).toBe(true)
    expect(status(folder)).toMatchObject(usable)
    expect(status(folder).reason).toMatch(
      /^CUDA 13\.\d+ is built in, but the NVIDIA driver is for CUDA 12\.4, which is too old\.$/,
    )
  },
)

test('there is a prebuild for what the error lists', async () => {
  const { prebuilt } = (await import('../dist/lib/native.js')) as { prebuilt: readonly string[] }
  const { platforms } = await import('../scripts/prebuild.mjs')
  expect(prebuilt).toEqual(platforms)
  expect(existsSync(addon)).toBe(true)
})
