// A package registry on this machine, so that installing is tested without a network: it serves what
// package-lock.json lists, with the contents of node_modules, and a package packed here. What the lock
// file lists for other platforms is empty but for its manifest.
import { execFileSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { gzipSync } from 'node:zlib'

type Manifest = { name: string; version: string; [field: string]: unknown }

interface Version {
  manifest: Manifest
  /** The package as npm pack would write it. */
  tarball: () => Buffer
}

const pack = (folder: string): Buffer =>
  gzipSync(
    execFileSync(
      'tar',
      ['-cf', '-', '--exclude=./node_modules', '--transform=s,^\\.,package,', '-C', folder, '.'],
      { maxBuffer: 1 << 28 },
    ),
    { level: 1 },
  )

function packManifest(manifest: Manifest): Buffer {
  const folder = mkdtempSync(join(tmpdir(), 'p2r-manifest-'))
  try {
    writeFileSync(join(folder, 'package.json'), JSON.stringify(manifest))
    return pack(folder)
  } finally {
    rmSync(folder, { recursive: true })
  }
}

function versionsIn(root: string): Map<string, Version[]> {
  const { packages } = JSON.parse(readFileSync(join(root, 'package-lock.json'), 'utf8')) as {
    packages: Record<string, Omit<Manifest, 'name'>>
  }
  const all = new Map<string, Version[]>()
  for (const [path, entry] of Object.entries(packages)) {
    const [, name] = path.match(/.*node_modules\/(.+)$/) ?? []
    if (!name) continue
    const folder = join(root, path)
    const here = existsSync(join(folder, 'package.json'))
    const manifest: Manifest = here
      ? JSON.parse(readFileSync(join(folder, 'package.json'), 'utf8'))
      : { ...entry, name, version: entry.version as string }
    const tarball = () => (here ? pack(folder) : packManifest(manifest))
    all.set(name, [...(all.get(name) ?? []), { manifest, tarball }])
  }
  return all
}

/** Serves the packages of the checkout at `root`, and `own`, packed; `url` is what installers are given. */
export async function startRegistry(
  root: string,
  own: { manifest: Manifest; file: string },
): Promise<{ url: string; close(): void }> {
  const all = versionsIn(root)
  all.set(own.manifest.name, [{ manifest: own.manifest, tarball: () => readFileSync(own.file) }])
  const packed = new Map<Version, Buffer>()
  const bytesOf = (version: Version): Buffer => {
    const bytes = packed.get(version) ?? version.tarball()
    packed.set(version, bytes)
    return bytes
  }
  const server = createServer((request, response) => {
    const path = decodeURIComponent(request.url!.slice(1))
    const [name, version] = path.split('/-/')
    const versions = all.get(name!)
    if (!versions) return void response.writeHead(404).end('{}')
    if (version) {
      const wanted = versions.find((v) => v.manifest.version === version.replace(/\.tgz$/, ''))
      return void (wanted ? response.end(bytesOf(wanted)) : response.writeHead(404).end())
    }
    const described = versions.map((v) => {
      const hash = (algorithm: string) => createHash(algorithm).update(bytesOf(v))
      const dist = {
        tarball: `${url}${encodeURIComponent(name!)}/-/${v.manifest.version}.tgz`,
        integrity: `sha512-${hash('sha512').digest('base64')}`,
        shasum: hash('sha1').digest('hex'),
      }
      return [v.manifest.version, { ...v.manifest, scripts: {}, devDependencies: {}, dist }]
    })
    const latest = versions.at(-1)!.manifest.version
    response.setHeader('content-type', 'application/json')
    response.end(
      JSON.stringify({
        name,
        'dist-tags': { latest },
        versions: Object.fromEntries(described),
        time: {},
      }),
    )
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/`
  return { url, close: () => void server.close() }
}
