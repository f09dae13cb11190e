"""Keeps a share (data.train_fraction, 15 %) of every class folder for training.

python img_sampler_train.py                 copies from data.train_original to data.train
python img_sampler_train.py --link          hard links instead of copies: no disk space
python img_sampler_train.py --set data.train_fraction=0.3 --overwrite
"""

from experiment.parameters import read_parameters, run_script, script_parser
from experiment.sampling import class_folders, list_images, sample, share


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--link", action="store_true", help="hard links instead of copies")
    parser.add_argument("--overwrite", action="store_true", help="replace a sample of another fraction or seed")
    arguments = parser.parse_args()
    data = read_parameters(arguments.parameters or "parameters.json", arguments.set).data

    kept = {}
    for name in class_folders(data.train_original):
        kept[name] = share(list_images(f"{data.train_original}/{name}"), data.train_fraction, data.seed, name)
    sample(
        data.train_original,
        {data.train: kept},
        fraction=data.train_fraction,
        seed=data.seed,
        link=arguments.link,
        overwrite=arguments.overwrite,
    )


if __name__ == "__main__":
    run_script(main)
