// The package as its users get it: packed, installed from a registry on this machine (registry.ts) into
// empty projects, with Node alone on the path, and used in every way that there is.
import { execFile } from 'node:child_process'
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { delimiter, dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { platforms, prebuild, prebuildProblem } from '../scripts/prebuild.mjs'
import { emulated, emulationProblem } from './emulated.js'
import { startRegistry } from './registry.js'

const root = fileURLToPath(new URL('..', import.meta.url))
const manifest = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'))
const folder = realpathSync(mkdtempSync(join(tmpdir(), 'p2r-pack-')))
const project = join(folder, 'npm')
const installed = join(project, 'node_modules/p2r-kernels')
const tarball = join(folder, 'p2r-kernels.tgz')
const path = join(folder, 'bin')

const bin = (path: string) => join(root, 'node_modules', path)
const toolPath = (name: string) =>
  (process.env.PATH ?? '')
    .split(delimiter)
    .map((folder) => join(folder, name))
    .find(existsSync)

const npmCli = () => realpathSync(process.env.npm_execpath ?? toolPath('npm')!)

// Nothing but Node on the path, and nothing of how this machine's npm is set up.
const env = {
  ...Object.fromEntries(
    Object.entries(process.env).filter(([name]) => !/^(npm|pnpm|yarn)_/i.test(name)),
  ),
  PATH: path,
  HOME: folder,
  P2R_DEVICE: 'cpu',
}
const exec = promisify(execFile)
/** Standard output; the error of one that fails holds what it wrote to the other. */
async function run(command: string, args: string[], cwd: string): Promise<string> {
  return (await exec(command, args, { cwd, env, maxBuffer: 1 << 26 })).stdout
}
const node = (args: string[], cwd: string, binary = process.execPath) => run(binary, args, cwd)

const platform = `${process.platform}-${process.arch}`
const notHere = prebuildProblem(platform)
const allFamilies = [
  ...new Set(
    [...readFileSync(join(root, 'ops/ops.def'), 'utf8').matchAll(/^OP\((\w+),/gm)].map(
      ([, f]) => f!,
    ),
  ),
].sort()
const families = `${allFamilies.join(' ')}\n`

let registry: Awaited<ReturnType<typeof startRegistry>>
let installing = 0

beforeAll(async () => {
  if (notHere) return
  await prebuild(platform, { base: true })
  if (!prebuildProblem('linux-arm64')) await prebuild('linux-arm64', { base: true })
  const { stdout } = await exec(
    process.execPath,
    [npmCli(), 'pack', '--json', '--ignore-scripts', '--pack-destination', folder],
    { cwd: root, maxBuffer: 1 << 26 },
  )
  renameSync(join(folder, JSON.parse(stdout)[0].filename), tarball)
  registry = await startRegistry(root, { manifest, file: tarball })
  mkdirSync(path)
  symlinkSync(process.execPath, join(path, 'node'))
  const start = performance.now()
  await install('npm', project)
  installing = performance.now() - start
}, 900_000)
afterAll(() => {
  registry?.close()
  rmSync(folder, { recursive: true })
}, 120_000)

const installers = {
  npm: () => [
    npmCli(),
    'install',
    '--ignore-scripts',
    '--no-audit',
    '--no-fund',
    '--cache',
    'cache',
  ],
  pnpm: () => [bin('pnpm/bin/pnpm.cjs'), 'add', '--ignore-scripts', '--store-dir', 'store'],
  yarn: () => [
    bin('yarn/bin/yarn.js'),
    ...['add', '--ignore-scripts', '--non-interactive', '--no-progress', '--cache-folder', 'cache'],
  ],
}

/** An empty project with the package in it, and the programs that use it. */
async function install(manager: keyof typeof installers, at: string): Promise<void> {
  mkdirSync(at)
  writeFileSync(join(at, 'package.json'), '{ "private": true, "license": "MIT" }')
  await node([...installers[manager](), `--registry=${registry.url}`, 'p2r-kernels'], at)
  cpSync(join(root, 'test/pack/families.mjs'), join(at, 'families.mjs'))
  const use = `.then(async ({ families }) => console.log((await families(p2r)).sort().join(' ')))`
  writeFileSync(
    join(at, 'use.mjs'),
    `import * as p2r from 'p2r-kernels'\nimport('./families.mjs')${use}`,
  )
  writeFileSync(
    join(at, 'use.cjs'),
    `const p2r = require('p2r-kernels')\nimport('./families.mjs')${use}`,
  )
}

const suite = describe.skipIf(notHere !== undefined)
const title = notHere ? ` (skipped: ${notHere})` : ''

suite(`the package${title}`, () => {
  test('has the files of its manifest, and the sources that build it', () => {
    // A pattern of files stands for their folder.
    for (const file of [...manifest.files, 'README.md', 'LICENSE', manifest.types])
      expect(existsSync(join(installed, file.replace(/\/\*.*$/, ''))), file).toBe(true)
    for (const sources of ['ops', 'cpu', 'cuda', 'binding'])
      expect(readdirSync(join(installed, sources), { recursive: true }).sort(), sources).toEqual(
        readdirSync(join(root, sources), { recursive: true }).sort(),
      )
    for (const file of ['test', 'node_modules', 'build', '.ci', 'lib', 'docs/api'])
      expect(existsSync(join(installed, file)), file).toBe(false)
  })

  test('runs no script when it is installed, and is within its bounds', () => {
    const { scripts } = JSON.parse(readFileSync(join(installed, 'package.json'), 'utf8'))
    for (const name of ['preinstall', 'install', 'postinstall', 'prepare'])
      expect(scripts).not.toHaveProperty(name)
    // Which npm would take for an install script.
    expect(existsSync(join(installed, 'binding.gyp'))).toBe(false)
    const modules = join(project, 'node_modules')
    const bytes = readdirSync(modules, { recursive: true, encoding: 'utf8' })
      .map((name) => statSync(join(modules, name)))
      .reduce((sum, file) => sum + (file.isFile() ? file.size : 0), 0)
    const megabytes = (n: number) => `${(n / 1e6).toFixed(1)} MB`
    console.log(
      `packed ${megabytes(statSync(tarball).size)}, with its dependencies ${megabytes(bytes)} on disk, ` +
        `installed in ${(installing / 1000).toFixed(1)} s`,
    )
    expect(statSync(tarball).size).toBeLessThan(20e6)
    expect(bytes).toBeLessThan(40e6)
  })

  test('only its entry and manifest can be imported', async () => {
    writeFileSync(
      join(project, 'closed.mjs'),
      `import 'p2r-kernels/package.json' with { type: 'json' }
       await import('p2r-kernels/dist/lib/native.js').catch((e) => console.log(e.code))`,
    )
    expect(await node(['--no-warnings', 'closed.mjs'], project)).toBe(
      'ERR_PACKAGE_PATH_NOT_EXPORTED\n',
    )
  })

  test.each(['mjs', 'cjs'])('computes every family from .%s', async (kind) => {
    expect(await node([`use.${kind}`], project)).toBe(families)
  })

  test.each(['pnpm', 'yarn'] as const)(
    'computes as %s installs it',
    { timeout: 120_000 },
    async (manager) => {
      const at = join(folder, manager)
      await install(manager, at)
      for (const kind of ['mjs', 'cjs']) expect(await node([`use.${kind}`], at)).toBe(families)
    },
  )

  test('computes in a worker thread', async () => {
    writeFileSync(
      join(project, 'worker.mjs'),
      `import { Worker } from 'node:worker_threads'
       new Worker(new URL('./use.mjs', import.meta.url))`,
    )
    expect(await node(['worker.mjs'], project)).toBe(families)
  })

  test('compiles in a strict TypeScript project that checks its declarations too', async () => {
    cpSync(join(root, 'test/consumer'), join(project, 'consumer'), { recursive: true })
    const config = join(project, 'consumer/tsconfig.json')
    const { compilerOptions, include } = JSON.parse(readFileSync(config, 'utf8'))
    expect(compilerOptions).toMatchObject({ strict: true, skipLibCheck: false })
    const { paths, ...options } = compilerOptions
    expect(paths).toHaveProperty('p2r-kernels')
    writeFileSync(config, JSON.stringify({ compilerOptions: options, include }))
    expect(await node([bin('typescript/bin/tsc'), '-p', 'consumer'], project)).toBe('')
  })

  test('has a command', async () => {
    const command = join(project, 'node_modules/.bin/p2r-kernels')
    expect(await run(command, ['--version'], project)).toBe(`${manifest.version}\n`)
    expect(await run(command, ['devices', '--json'], project)).toMatch(/"backend": "cpu"/)
    const bench = ['bench', 'advantages', '--quick', '--no-peers', '--threads', '1']
    const text = await run(command, bench, project)
    expect(text).toMatch(/^ceilings +fma /m)
    expect(text).toMatch(/^ {2}p2r-kernels +1 +[\d.]+ +\d+ %/m)
  })

  // A compiler cache where one is in use, as CMake has it by the same name.
  const { CMAKE_CXX_COMPILER_LAUNCHER: launcher } = process.env
  const cached = launcher ? { CXX: `${toolPath(launcher)} ${toolPath('c++')}` } : {}
  const tools = ['make', 'c++', 'as', 'ld', 'sh', 'mkdir', 'uname']
  const missing = tools.filter((tool) => !toolPath(tool))
  test.skipIf(missing.length)(
    `builds from source with a compiler and make${missing.length ? ` (skipped: needs ${missing})` : ''}`,
    { timeout: 900_000 },
    async () => {
      const few = join(folder, 'tools')
      mkdirSync(few)
      for (const tool of tools) symlinkSync(toolPath(tool)!, join(few, tool))
      const command = join(project, 'node_modules/.bin/p2r-kernels')
      await exec(command, ['build'], {
        cwd: project,
        env: { ...env, PATH: `${path}:${few}`, ...cached },
        maxBuffer: 1 << 26,
      })
      const made = join(installed, 'build/Release/p2r_kernels.node')
      expect(existsSync(made)).toBe(true)
      // It comes before the prebuild.
      const loaded = `require('p2r-kernels').devices()
        console.log(Object.keys(require.cache).filter((p) => p.endsWith('.node')).join())`
      expect(await node(['--no-warnings', '-e', loaded], project)).toBe(`${made}\n`)
      expect(await node(['use.mjs'], project)).toBe(families)
      rmSync(join(installed, 'build'), { recursive: true })
    },
  )

  test('names the optional peer if it is missing', async () => {
    writeFileSync(
      join(project, 'peer.mjs'),
      `import { OpenAIPolicy } from 'p2r-kernels'
       const policy = new OpenAIPolicy({ baseURL: 'http://127.0.0.1:1/v1', model: 'm' })
       const request = { role: 'reasoner', system: '', prompt: 'x', images: [] }
       await policy.generate(request).catch((e) => console.log(e.code, e.message))`,
    )
    expect(await node(['peer.mjs'], project)).toMatch(/^ERR_POLICY .*npm install openai/)
  })
})

// ---- Other versions of Node, and another processor ----

const nodes = join(root, 'build/node')
/** The program of the npm package that carries it; kept in build/node. */
async function nodeBinary(version: string, arch = 'x64'): Promise<string> {
  const binary = join(nodes, `${version}-${arch}`, 'package/bin/node')
  if (existsSync(binary)) return binary
  const at = join(nodes, `${version}-${arch}`)
  mkdirSync(at, { recursive: true })
  const { stdout } = await exec(
    process.execPath,
    [npmCli(), 'pack', '--silent', '--prefer-offline', `node-linux-${arch}@${version}`],
    { cwd: at },
  )
  await exec('tar', ['-xzf', stdout.trim(), 'package/bin/node'], { cwd: at })
  rmSync(join(at, stdout.trim()))
  return binary
}

suite(`the package${title}`, () => {
  test.skipIf(platform !== 'linux-x64').each(['20.19.6', '22.19.0', '24.13.0'])(
    'computes under Node %s',
    { timeout: 300_000 },
    async (version) => {
      const binary = await nodeBinary(version)
      expect(await node(['--version'], project, binary)).toBe(`v${version}\n`)
      for (const kind of ['mjs', 'cjs'])
        expect(await node(['--no-warnings', `use.${kind}`], project, binary)).toBe(families)
    },
  )

  const unemulated = platform === 'linux-arm64' ? undefined : emulationProblem()
  test.skipIf(unemulated)(
    `computes on arm64${unemulated ? ` (skipped: ${unemulated})` : ''}`,
    { timeout: 300_000 },
    async () => {
      const [emulator, ...args] = [...emulated(await nodeBinary('22.23.5', 'arm64'))]
      const { stdout } = await exec(emulator!, [...args, 'use.mjs'], {
        cwd: project,
        env: { ...env, PATH: process.env.PATH },
      })
      expect(stdout).toBe(families)
    },
  )

  const made = platforms.filter((p) => !prebuildProblem(p))
  test.each(made)('has a prebuild of %s that needs no glibc later than 2.28', async (name) => {
    const file = join(installed, 'prebuilds', name, 'p2r_kernels.node')
    const { stdout } = await exec('readelf', ['--version-info', '--wide', file], {
      maxBuffer: 1 << 26,
    })
    const versions = [...stdout.matchAll(/Name: (GLIBC|GLIBCXX|CXXABI)_([\d.]+)/g)]
    expect(versions.length).toBeGreaterThan(0)
    const newest = Math.max(...versions.map(([, , v]) => Number(v!.split('.')[1])))
    console.log(`${name}: glibc 2.${newest}`)
    expect(new Set(versions.map(([, library]) => library))).toEqual(new Set(['GLIBC']))
    expect(newest).toBeLessThanOrEqual(28)
    // It brings the C++ and CUDA runtimes along, and shows nothing of them.
    const dynamic = (await exec('readelf', ['--dynamic', '--dyn-syms', '--wide', file])).stdout
    const needed = [...dynamic.matchAll(/Shared library: \[(\w+)/g)].map(([, library]) => library)
    for (const library of needed)
      expect(library).toMatch(/^(libc|libm|libdl|librt|libpthread|libgcc_s|ld)$/)
    const exported = [...dynamic.matchAll(/ (?:GLOBAL|WEAK) +DEFAULT +\d+ (\S+)$/gm)]
    expect(exported.map(([, symbol]) => symbol).sort()).toEqual([
      'napi_register_module_v1',
      'node_api_module_get_api_version_v1',
    ])
  })
})

// ---- Bundles ----

type Bundler = (
  entry: string,
  out: string,
  format: 'esm' | 'cjs',
  external: boolean,
) => Promise<void>
const bundlers: Record<string, Bundler> = {
  async esbuild(entry, outfile, format, external) {
    const { build } = await import('esbuild')
    const common = { bundle: true, platform: 'node', logLevel: 'silent' } as const
    await build({
      ...common,
      entryPoints: [entry],
      outfile,
      format,
      external: external ? ['p2r-kernels'] : [],
    })
  },
  async rolldown(input, file, format, external) {
    const { build } = await import('rolldown')
    await build({
      input,
      platform: 'node',
      logLevel: 'silent',
      output: { file, format, codeSplitting: false },
      external: external ? ['p2r-kernels'] : [],
    })
  },
  async webpack(entry, out, format, external) {
    const { default: webpack } = await import('webpack')
    const compiler = webpack({
      mode: 'none',
      target: 'node20',
      entry,
      experiments: { outputModule: format === 'esm' },
      output: {
        module: format === 'esm',
        chunkFormat: format === 'esm' ? 'module' : 'commonjs',
        path: dirname(out),
        filename: out.slice(dirname(out).length + 1),
      },
      externals: external ? { 'p2r-kernels': 'import p2r-kernels' } : {},
    })!
    await new Promise<void>((resolve, reject) =>
      compiler.run((error, stats) =>
        error || stats!.hasErrors() ? reject(error ?? new Error(stats!.toString())) : resolve(),
      ),
    )
  },
}

suite(`in a bundle${title}`, () => {
  const entry = join(project, 'entry.mjs')
  beforeAll(() =>
    writeFileSync(
      entry,
      `import { P2RError, openDevice } from 'p2r-kernels'
       import * as p2r from 'p2r-kernels'
       import { families } from './families.mjs'
       families(p2r).then(
         (all) => console.log(all.sort().join(' ')),
         (error) => console.log(error instanceof P2RError, error.message))`,
    ),
  )
  const formats = [
    ['esm', 'mjs'],
    ['cjs', 'cjs'],
  ] as const
  for (const [name, bundle] of Object.entries(bundlers))
    for (const [format, extension] of formats) {
      test(`by ${name} as ${format} it computes where it is external`, async () => {
        const out = join(project, `external-${name}.${extension}`)
        await bundle(entry, out, format, true)
        expect(await node(['--no-warnings', out], project)).toBe(families)
      })
      test(`by ${name} as ${format} it says how to keep it external where it is not`, async () => {
        const out = join(folder, `bundled-${name}.${extension}`)
        await bundle(entry, out, format, false)
        // Bundles run elsewhere.
        renameSync(join(project, 'node_modules'), join(project, 'away'))
        try {
          const said = await node(['--no-warnings', out], folder)
          expect(said).toMatch(/^true p2r-kernels was bundled.* Keep it external/)
          expect(said).toContain('--external:p2r-kernels')
        } finally {
          renameSync(join(project, 'away'), join(project, 'node_modules'))
        }
      })
    }
})
