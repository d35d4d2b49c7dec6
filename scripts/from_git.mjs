// npm installs a package from git by installing its checkout, which runs the checkout's `dependencies`
// script, and packs what is there: sources. This says so instead. Elsewhere that script does nothing.
if (process.env._PACOTE_NO_PREPARE_) {
  console.error(
    'p2r-kernels cannot be installed from git: a checkout holds nothing compiled. Install it from the ' +
      'registry, or clone it, run `npm ci` and `npm pack` there, and install the tarball.',
  )
  process.exit(1)
}
