// Builds what is missing or out of date in a checkout: the addon, then the TypeScript.
//
//   node scripts/build.mjs [--cuda=auto|on|off] [--strict]
//
// auto builds for CUDA where there are nvcc and a GPU, and with --strict, which is to compile
// everything, where there is nvcc. Elsewhere an addon that was built with CUDA is as good as one without.
import { existsSync, rmSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { addonOptions, buildAddon, found, root, run } from './addon.mjs'
import { bundle, importedByTests } from './bundle.mjs'
import { addonKey, digest, upToDate } from './up_to_date.mjs'

const { cuda, strict } = addonOptions(process.argv.slice(2))

const hasGpu = () => existsSync('/proc/driver/nvidia/version') || existsSync('/dev/dxg')
const wanted =
  cuda !== 'auto' ? cuda : found('nvcc') && found('cmake') && (strict || hasGpu()) ? 'on' : 'off'
const key = (kind, warnings) => addonKey('addon', kind, warnings, process.arch, root)
const kinds = cuda === 'auto' && wanted === 'off' ? ['off', 'on'] : [wanted]
await upToDate(
  'addon',
  kinds.flatMap((kind) => (strict ? [true] : [false, true]).map((warnings) => key(kind, warnings))),
  ['build/Release/p2r_kernels.node'],
  () => {
    if (cuda === 'auto' && wanted === 'off' && found('nvcc'))
      console.log(
        'build: no NVIDIA driver here, so the CUDA kernels are left out; --cuda=on has them.',
      )
    buildAddon({ cuda: wanted, strict })
  },
)

await upToDate(
  'typescript',
  [
    digest(
      [
        ...['lib', 'examples', 'bench', 'reliability'],
        ...['scripts/bundle.mjs', 'tsconfig.json', 'package-lock.json'],
      ],
      /(\.ts|\.mjs|\.json)$/,
      root,
      importedByTests().sort(),
    ),
  ],
  ['dist/lib/index.js', 'dist/lib/index.d.ts'],
  async () => {
    const require = createRequire(import.meta.url)
    const tsc = join(dirname(require.resolve('typescript/package.json')), 'bin/tsc')
    rmSync(join(root, 'dist'), { recursive: true, force: true })
    run(process.execPath, [tsc], 'the TypeScript does not compile')
    await bundle()
  },
)
