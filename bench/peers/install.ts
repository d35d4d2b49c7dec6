// Installs the peers beside the build, from their own package.json and lock, in a checkout; an installed
// package uses those of the project that it is in. No install script runs:
// onnxruntime-node's would only fetch CUDA libraries, and its CPU library is in the package.
import { spawnSync } from 'node:child_process'
import { copyFileSync, existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = fileURLToPath(new URL('../../..', import.meta.url))
const source = join(root, 'bench/peers')
const folder = join(root, 'build/peers')

/** undefined if they are installed; the reason if they could not be. */
export function installPeers(): string | undefined {
  if (!existsSync(join(source, 'package-lock.json'))) return undefined
  const lock = readFileSync(join(source, 'package-lock.json'), 'utf8')
  const stamp = join(folder, 'installed')
  if (existsSync(stamp) && readFileSync(stamp, 'utf8') === lock) return undefined
  mkdirSync(folder, { recursive: true })
  for (const name of ['package.json', 'package-lock.json'])
    copyFileSync(join(source, name), join(folder, name))
  const { status } = spawnSync('npm', ['ci', '--ignore-scripts', '--no-audit', '--no-fund'], {
    cwd: folder,
    env: { ...process.env, ONNXRUNTIME_NODE_INSTALL: 'skip' },
    encoding: 'utf8',
    timeout: 300_000,
    shell: process.platform === 'win32',
  })
  if (status !== 0)
    return 'The peers of bench/peers/package.json could not be installed from the npm registry.'
  writeFileSync(stamp, lock)
  return undefined
}

/** Where a peer is installed: beside the build, or in the project that uses this package. */
const places = [join(folder, 'package.json'), join(process.cwd(), 'package.json')]

/** A module of the peers; throws where it is not installed or does not load. */
export function peerModule(name: string): unknown {
  const [here, there] = places.map((place) => createRequire(place)) as [
    NodeJS.Require,
    NodeJS.Require,
  ]
  return peerVersion(name, places.slice(0, 1)) ? here(name) : there(name)
}

export function peerVersion(name: string, where = places): string | undefined {
  for (const place of where)
    try {
      const path = join(dirname(place), 'node_modules', name, 'package.json')
      return JSON.parse(readFileSync(path, 'utf8')).version
    } catch {
      // The next place may have it.
    }
  return undefined
}
