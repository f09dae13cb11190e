"""Splits the validation folder into two disjoint parts: for validation during training, and for the test.

python img_sampler_val.py                   copies from data.val_original to data.val and data.test
python img_sampler_val.py --link            hard links instead of copies: no disk space
python img_sampler_val.py --set data.val_fraction=0.2 --overwrite
"""

from experiment.parameters import read_parameters
from experiment.sampling import images_by_class, refuse_overlap, sample, share
from experiment.script import run_script, script_parser


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--link", action="store_true", help="hard links instead of copies")
    parser.add_argument("--overwrite", action="store_true", help="replace a split of another source, fraction or seed")
    arguments = parser.parse_args()
    data = read_parameters(arguments.parameters or "parameters.json", arguments.set).data

    refuse_overlap(data.test, data.val)
    val, test = {}, {}
    for name, images in images_by_class(data.val_original).items():
        val[name] = share(images, data.val_fraction, data.seed, name)
        test[name] = sorted(set(images) - set(val[name]))
    how = {"fraction": data.val_fraction, "seed": data.seed, "link": arguments.link, "overwrite": arguments.overwrite}
    sample(data.val_original, {data.val: val, data.test: test}, **how)


if __name__ == "__main__":
    run_script(main)
